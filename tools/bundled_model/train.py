#!/usr/bin/env python3
"""Trains the bundled model: text of stories.py -> tokens -> weights in the published layout.

    python train.py --model ../../models/marlin-stories --log train.jsonl

Needs PyTorch, safetensors and tokenizers. `--model` is the folder that holds
tokenizer.json; config.json, generation_config.json and model.safetensors are added.
"""

import argparse
import json
import math
import multiprocessing
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import stories
from model import CONFIG, Model, export_tensors, round_to_bf16

CHAT_SHARE = 0.15
CHUNK = 2000  # documents per tokenization job


def tokenize_chunk(job):
    """Token ids of documents [start, start + count) and the offset of each document."""
    tokenizer_file, start, count = job
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    ids, starts = [], []
    for i in range(start, start + count):
        starts.append(len(ids))
        ids.extend(tokenizer.encode(stories.document("train", i, CHAT_SHARE)).ids)
    return np.array(ids, dtype=np.uint16), np.array(starts, dtype=np.int64)


def training_tokens(tokenizer_file, documents, workers):
    jobs = [(tokenizer_file, s, min(CHUNK, documents - s)) for s in range(0, documents, CHUNK)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(tokenize_chunk, jobs, chunksize=1)
    base = np.cumsum([0] + [len(p[0]) for p in parts[:-1]])
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] + b for p, b in zip(parts, base)])


class Batches:
    """Rows of `length + 1` tokens in shuffled order; every other row starts at a document."""

    def __init__(self, tokens, starts, length, batch, seed, device):
        self.tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)
        self.length, self.batch, self.device = length, batch, device
        rows = (len(tokens) - 2 * length) // length
        first = np.arange(rows) * length
        snapped = starts[np.searchsorted(starts, first)]
        self.first = np.where(np.arange(rows) % 2 == 0, snapped, first)
        self.rng = np.random.default_rng(seed)
        self.order = np.empty(0, dtype=np.int64)

    def next(self):
        while len(self.order) < self.batch:
            self.order = np.concatenate([self.order, self.rng.permutation(len(self.first))])
        rows, self.order = self.order[: self.batch], self.order[self.batch:]
        index = torch.from_numpy(self.first[rows]).to(self.device)[:, None] + torch.arange(self.length + 1, device=self.device)
        return self.tokens[index].long()


def learning_rate(step, args):
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_for(model, args, device):
    """AdamW with weight decay on the matrices and none on the norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")


def balance(model, loads, rate):
    """Loss-free balancing: raise the bias of the experts that got less than their share."""
    for moe, load in zip(model.moe_layers(), loads):
        moe.bias += rate * torch.sign(load.mean() - load)


def train(model, batches, args, device, log):
    step_model = torch.compile(model) if args.compile else model
    optimizer = optimizer_for(model, args, device)
    began = time.time()
    total_load = torch.zeros(len(model.moe_layers()), CONFIG["n_routed_experts"], device=device)
    window = []
    for step in range(args.steps):
        rows = batches.next()
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device, dtype=torch.bfloat16):
            logits, loads = step_model(rows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            balance(model, loads, args.bias_rate * rate / args.lr)
            if step >= args.steps - 100:
                total_load += loads
        window.append(loss.detach())
        if (step + 1) % args.report == 0 or step + 1 == args.steps:
            value = torch.stack(window).mean().item()
            window.clear()
            seconds = time.time() - began
            log({"step": step + 1, "loss": round(value, 4), "lr": rate, "seconds": round(seconds, 1), "tokens_per_s": round((step + 1) * rows[:, 1:].numel() / seconds)})
    share = total_load / total_load.sum(1, keepdim=True)
    log({"expert_load_last_100_steps": [[round(v, 4) for v in row] for row in share.tolist()],
         "correction_bias": [[round(v, 5) for v in m.bias.tolist()] for m in model.moe_layers()]})


def write_model(model, folder):
    save_file(export_tensors(model), os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    generation = {"do_sample": True, "eos_token_id": [0], "pad_token_id": 1, "temperature": 0.7, "top_p": 0.95}
    for name, content in (("config.json", model.config), ("generation_config.json", generation)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=2)
            f.write("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--documents", type=int, default=1_200_000)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--bias-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--report", type=int, default=100)
    parser.add_argument("--log", help="file for one JSON line per report")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    log_file = open(args.log, "w", encoding="utf-8") if args.log else None

    def log(entry):
        line = json.dumps(entry)
        print(line, flush=True)
        if log_file:
            print(line, file=log_file, flush=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.time()
    tokens, starts = training_tokens(os.path.join(args.model, "tokenizer.json"), args.documents, args.workers)
    log({"documents": args.documents, "tokens": len(tokens), "seconds": round(time.time() - began, 1), "arguments": vars(args)})
    torch.manual_seed(args.seed)
    model = Model().to(device)
    log({"parameters": sum(p.numel() for p in model.parameters())})
    train(model, Batches(tokens, starts, args.length, args.batch, args.seed, device), args, device, log)
    round_to_bf16(model)
    write_model(model, args.model)


if __name__ == "__main__":
    main()
