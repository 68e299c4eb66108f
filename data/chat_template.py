"""A model's own chat template, rendered in a process of its own under limits of time, memory and output.

A chat template is a program from somebody's model folder. Jinja's sandbox keeps it from files and from Python's
internals, but not from a loop or a text without end, and some of these never return to Python. So the operating
system ends the process that renders.

The process runs chat_worker.py.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import weakref
from pathlib import Path

WORKER = Path(__file__).with_name("chat_worker.py")
LIMITS = {
    "seconds": 5,  # CPU time for one conversation; a real one takes about a millisecond
    "memory": 2**30,  # bytes of the process's address space; Python and jinja2 take 30 MB
    "length": 2**24,  # characters of a rendered conversation
}
TOGETHER = 32  # conversations sent at once; the process reads all of them before it answers the first


class ChatTemplate:
    """A compiled chat template: conversations -> (text, spans of the answers).

    Args:
        source:         the template's text.
        special_tokens: names that it may use, such as {"bos_token": "<s>"}.
    Raises:
        ValueError: it does not compile, passes a limit, or where its answers end cannot be known.
    """

    def __init__(self, source: str, special_tokens: dict):
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],  # -P: the modules beside it hide none of the library's
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C reaches the caller alone
        )
        weakref.finalize(self, _end, self.process)
        self._send([source, special_tokens, LIMITS])
        self._receive()

    def render(self, conversations: list[dict]) -> list[tuple[str, list[tuple[int, int]]] | ValueError]:
        """Each conversation's whole text and where its answers are, as chat_worker.located defines it.

        Args:
            conversations: {"messages": [...], "tools": [...] or None}, as transformers' apply_chat_template takes them.
        Returns:
            For each: (text, [(start, end), ...]) with one span of characters for each assistant message, in order; or
            the ValueError that says why the template cannot render it.
        Raises:
            ValueError: the template passed a limit. That ends the process: no further row is tried.
        """
        rendered = []
        for start in range(0, len(conversations), TOGETHER):
            group = conversations[start : start + TOGETHER]
            self._send(group)
            for _ in group:
                try:
                    text, spans = self._receive()
                    rendered.append((text, [tuple(span) for span in spans]))
                except _Refused as error:
                    rendered.append(ValueError(str(error)))
        return rendered

    def _send(self, value: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # the process has ended; _receive says why
            self.process.stdin.write(json.dumps(value).encode() + b"\n")
            self.process.stdin.flush()

    def _receive(self) -> object:
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            status = self.process.wait()
            if status == -signal.SIGPROF:
                raise ValueError(f"the chat_template did not finish in {LIMITS['seconds']} s{WAY_OUT}")
            raise ValueError(f"the process that renders the chat_template ended with status {status}{WAY_OUT}")
        status, value = json.loads(line)
        if status == "limit":
            raise ValueError(value + WAY_OUT)
        if status == "refused":
            raise _Refused(value)
        return value


class _Refused(ValueError):
    """One conversation is refused."""


WAY_OUT = "; name another --template"


def _end(process: subprocess.Popen) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):  # closing sends what was not sent
        process.stdin.close()
    process.wait()
    process.stdout.close()
