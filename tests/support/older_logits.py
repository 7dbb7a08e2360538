"""Run by another environment's Python, with an older transformers: the logits of models that were saved here.

older_logits.py OUT FOLDER ...  reads inputs.json in each folder, and writes {folder: logits} to OUT.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(out: str, *folders: str) -> None:
    found = {}
    for folder in folders:
        asked = json.loads(Path(folder, "inputs.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", torch_dtype=torch.float32)
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([asked["ids"]])).logits[0]
        found[folder] = {
            "logits": logits.tolist(),
            "use_cache": model.config.use_cache,
            "eos": model.generation_config.eos_token_id,
            "text_ids": AutoTokenizer.from_pretrained(folder)(asked["text"])["input_ids"],
        }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
