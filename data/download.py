"""Fetch the paper's training sets and benchmarks: python -m data.download gsm8k arc --out DIR

Each lands in DIR/<name>/ as its publisher has it; nothing is converted. Sets marked parquet cannot be read as
they are: write their rows to .jsonl first (pandas, or the `datasets` package, does it in one line).
"""

import argparse
import os
import shutil
import sys
import urllib.request
from pathlib import Path

import huggingface_hub

HUB = {  # name: (dataset repository on huggingface.co, files, what they are)
    "wizard": ("WizardLMTeam/WizardLM_evol_instruct_70k", "*.json", "70k rows, Alpaca form"),
    "wizard-v2": ("WizardLMTeam/WizardLM_evol_instruct_V2_196k", "*.json", "143k rows, ShareGPT form"),
    "mathinstruct": ("TIGER-Lab/MathInstruct", "MathInstruct.json", "262k rows, Alpaca form"),
    "openhermes": ("teknium/OpenHermes-2.5", "openhermes2_5.json", "1M rows, ShareGPT form"),
    "triviaqa": ("mandarjoshi/trivia_qa", "rc.nocontext/validation-*.parquet", "parquet"),
    "math": ("EleutherAI/hendrycks_math", "*/test-*.parquet", "5000 problems, parquet"),
    "math500": ("HuggingFaceH4/MATH-500", "test.jsonl", "500 of the 5000"),
}
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
WEB = {  # name: (addresses, what they are)
    "gsm8k": ((GSM8K + "train.jsonl", GSM8K + "test.jsonl"), "7473 and 1319 rows"),
    "arc": (
        ("https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip",),
        "the paper scores ARC-Easy-Dev.jsonl and ARC-Challenge-Dev.jsonl in it",
    ),
    "squad": (("https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",), "SQuAD 2.0, dev"),
}


def download(name, folder):
    """Fetch one set, a key of HUB or WEB, into folder. Raises OSError or ValueError where that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    if name in HUB:
        repo, files, _ = HUB[name]
        huggingface_hub.snapshot_download(repo, repo_type="dataset", allow_patterns=[files], local_dir=folder)
        if not any(folder.glob(files)):
            raise ValueError(f"{repo} on huggingface.co: expected files named {files}, got none")
        return
    for address in WEB[name][0]:
        path = folder / address.rsplit("/", 1)[1]
        partial = path.with_name(path.name + ".part")
        with urllib.request.urlopen(address, timeout=60) as source, open(partial, "wb") as target:
            shutil.copyfileobj(source, target)
            got, expected = target.tell(), source.headers.get("Content-Length")
        if expected is not None and got != int(expected):  # reading a broken connection just ends
            partial.unlink()
            raise OSError(f"{address}: the connection ended after {got} of {expected} bytes")
        os.replace(partial, path)
        if path.suffix == ".zip":
            shutil.unpack_archive(path, folder)


def main():
    about = "\n".join(f"  {name:13}{what}" for name, (*_, what) in (HUB | WEB).items())
    parser = argparse.ArgumentParser(
        prog="data.download",
        description=__doc__ + "\nsets:\n" + about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", choices=[*HUB, *WEB], metavar="NAME")
    parser.add_argument("--out", required=True, type=Path, help="folder to download into")
    args = parser.parse_args()
    for name in args.names:
        try:
            download(name, args.out / name)
        except (OSError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(f"data.download: {name}: could not be fetched: {reason}", file=sys.stderr)
            sys.exit(2)
        print(f"{name}: {(HUB | WEB)[name][-1]} -> {args.out / name}")


if __name__ == "__main__":
    main()
