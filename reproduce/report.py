"""Markdown of committed results that have no script of their own.

python -m reproduce.report      the scores of SmolLM2-135M, of results/smollm2_scores.json
"""

from __future__ import annotations

from pathlib import Path

from model import read_json

RESULTS = Path(__file__).parent / "results"
TASKS = {
    "arc_easy": "ARC-Easy dev",
    "arc_challenge": "ARC-Challenge dev",
    "gsm8k": "GSM8K test",
    "squad": "SQuAD 2.0 dev",
    "triviaqa": "TriviaQA",
    "math": "MATH-500",
}


def scores_table(results: dict) -> str:
    """One row a task and protocol: the score, then its further metrics (but the breakdowns), 95% intervals, time."""
    head = ["", "protocol", "n", "score, 95 % interval", "further metrics", "seconds"]
    lines = [head, ["---"] * len(head)]
    for task, name in TASKS.items():
        for protocol in ("paper", "standard"):
            found = results[task].get(protocol)
            if found is None:
                continue
            low, high = found["interval95"]
            further = {key: part for key, part in found.get("metrics", {}).items() if task != "math"}
            line = [name, found["protocol"], str(found["n"])]
            line.append(f"{found['metric']} {found['score']:.1f} [{low:.1f}, {high:.1f}]")
            line.append(", ".join(f"{key} {part['score']:.1f}" for key, part in further.items()))
            lines.append([*line, f"{found['seconds']:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(scores_table(read_json(RESULTS / "smollm2_scores.json")))
