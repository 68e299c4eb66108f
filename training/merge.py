"""One model folder of a base model and a LoRA adapter on it.

python -m training.merge BASE ADAPTER OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from model import Transformer
from training.files import read_object
from training.lora import load_adapter
from training.model_folder import tokenizer_files


def merge(base: str | Path, adapter: str | Path, out: str | Path) -> None:
    """Write the base model with the adapter merged into its weights, in the dtype that they are stored in.

    The tokenizer's files and the chat template are the adapter's where it has them, else the base's.

    Raises:
        FileNotFoundError, ValueError: as in from_pretrained and load_adapter; or `out` is not an empty folder.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a new or empty folder")
    raw = read_object(base / "config.json")
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(str(name))
    if dtype is None:
        raise ValueError(f"{base / 'config.json'}: torch_dtype {name!r} is not implemented")
    model = load_adapter(Transformer.from_pretrained(base, dtype=dtype), adapter)
    own = [file.name for file in tokenizer_files(adapter) if file.name != "generation_config.json"]
    files: dict[str, object] = {name: (adapter / name).read_text(encoding="utf-8") for name in own}
    if "tokenizer_config.json" in own:
        files.setdefault("chat_template.jinja", None)
    model.save_pretrained(out, extra_files=files)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="model folder in Hugging Face layout")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder in PEFT layout")
    parser.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    args = parser.parse_args(argv)
    try:
        merge(args.base, args.adapter, args.out)
    except (ValueError, OSError) as error:
        print(f"training.merge: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
