#!/usr/bin/env python3
"""Checks and measures the exported model with transformers.

    python evaluate.py --model ../../models/marlin-stories --data ../../models/data --golden ../../models/data/bundled_logits.safetensors

Compares the logits of model.py with transformers' on the exported weights, computes the
held-out perplexity, writes the golden logits and prints sample continuations.

Perplexity: the whole file is tokenized as one stream (special tokens recognized, none
added) and cut into contiguous, non-overlapping chunks of 512 tokens; a last chunk
shorter than 512 counts if it has at least 2 tokens. Each chunk is run on its own from
position 0; its first token is not scored, every other one is, given the chunk's tokens
before it. The perplexity is exp of the mean of all scored negative log likelihoods.
"""

import argparse
import json
import math
import os
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import stories
from model import Model, export_tensors

WINDOW = 512
GOLDEN_TOKENS = 48
OPENINGS = [
    "Once upon a time, there was a little girl named Lily.",
    "One sunny morning, a young fox named Rusty looked out of the window.",
    "In a small village, there lived a boy named Kirandel. He had a red kite",
]
REQUEST = "Tell me a story about a girl named Mia who finds a red kite."


def load(folder, dtype, device):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").to(device).eval()


def own_model(folder):
    """model.py's network with the exported weights, to compare with transformers'."""
    stored = load_file(os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        model = Model(json.load(f))
    state = model.state_dict()
    for name in state:
        if not (".mlp." in name and model.layers[int(name.split(".")[1])].is_moe):
            state[name] = stored[name if name.startswith("lm_head") else "model." + name].float()
            continue
        prefix, _, rest = name.partition(".mlp.")
        prefix = f"model.{prefix}.mlp."
        if rest in ("router", "bias"):
            state[name] = stored[prefix + ("gate.weight" if rest == "router" else "gate.e_score_correction_bias")].float()
        elif rest.startswith("shared."):
            state[name] = stored[prefix + "shared_experts." + rest.removeprefix("shared.")].float()
        else:
            experts = [stored[f"{prefix}experts.{e}.{rest}.weight"].float() for e in range(model.config["n_routed_experts"])]
            state[name] = torch.stack([w.t() for w in experts]) if rest == "down_proj" else torch.cat(experts)
    model.load_state_dict(state)
    if any(not torch.equal(t, stored[n]) for n, t in export_tensors(model).items()) or len(stored) != len(export_tensors(model)):
        sys.exit("the exported file does not hold exactly the model's tensors")
    return model.eval()


@torch.no_grad()
def parity(folder, ids):
    ours = own_model(folder)(ids)[0]
    theirs = load(folder, torch.float32, "cpu")(ids).logits
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(json.dumps({"parity_max_abs_error_over_max_abs_logit": error}))
    if not error < 1e-4:
        sys.exit("the training module and transformers disagree")


@torch.no_grad()
def perplexity(model, ids, device):
    total, count = 0.0, 0
    full = len(ids) // WINDOW * WINDOW
    groups = list(torch.tensor(ids[:full]).view(-1, WINDOW).split(16))
    if len(ids) - full >= 2:
        groups.append(torch.tensor(ids[full:])[None])
    for chunk in groups:
        chunk = chunk.to(device)
        logits = model(chunk).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").double().item()
        count += chunk[:, 1:].numel()
    return {"perplexity": math.exp(total / count), "nll_per_token": total / count, "scored_tokens": count, "tokens": len(ids)}


@torch.no_grad()
def sample(model, tokenizer, prompt, device, temperature):
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
    how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {"do_sample": False, "temperature": None, "top_p": None}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=700, eos_token_id=0, pad_token_id=1, **how)[0]
    print(f"--- temperature {temperature}, {len(out) - ids.shape[1]} new tokens\n{tokenizer.decode(out)}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder of heldout.txt")
    parser.add_argument("--golden", help="file for the golden logits")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    messages = stories.chat_messages("heldout", 3)
    chat = tokenizer.apply_chat_template([{"role": r, "content": t} for r, t in messages], tokenize=False)
    if chat != stories.render_chat(messages):
        sys.exit("the chat template does not make the training format")
    with open(os.path.join(args.data, "heldout.txt"), encoding="utf-8") as f:
        ids = tokenizer(f.read(), add_special_tokens=False).input_ids
    prompt = torch.tensor(ids[:GOLDEN_TOKENS])[None]
    parity(args.model, torch.tensor(ids[:256])[None])
    if args.golden:
        with torch.no_grad():
            logits = load(args.model, torch.float32, "cpu")(prompt).logits[0].contiguous()
        save_file({"tokens": prompt[0].to(torch.int32), "logits": logits}, args.golden, metadata={"dtype": "float32 compute on the stored weights"})
    for dtype in (torch.float32, torch.bfloat16):
        model = load(args.model, dtype, device)
        print(json.dumps({"dtype": str(dtype).removeprefix("torch."), "window": WINDOW, **perplexity(model, ids, device)}))
        if dtype == torch.float32:
            for text in OPENINGS + [stories.render_chat([("user", REQUEST)]) + "<|assistant|>\n"]:
                for temperature in (0, 0.7):
                    sample(model, tokenizer, text, device, temperature)


if __name__ == "__main__":
    main()
