"""An exported model in `transformers`: greedy texts behind some prompts, together, and how likely each prompt was.

pip install '.[hf]'
nsa-dist export runs/mine --to models/mine
python examples/in_transformers.py models/mine 'def main(' 'import '
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsa_dist.inference.huggingface  # noqa: F401  registers the classes


def main(folder: str, *prompts: str) -> None:
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    tokens = model.generate(**batch, max_new_tokens=40, do_sample=False)
    for prompt, text in zip(prompts, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
        row = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            loss = model(**row, labels=row["input_ids"]).loss
        print(f"--- loss of the prompt {loss:.3f} ---\n{text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
