#!/usr/bin/env python3
"""Trains the byte-level BPE tokenizer of the bundled model and writes its two files.

    python tokenizer.py --out ../../models/marlin-stories
"""

import argparse
import json
import os
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import stories

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
# The same text as stories.render_chat.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def train(documents):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((strip_special(stories.document("tokenizer", i, 0.15)) for i in range(documents)), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        sys.exit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    return tokenizer


def strip_special(text):
    for token in SPECIAL_TOKENS:
        text = text.replace(token, " ")
    return text


def save(tokenizer, folder):
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "clean_up_tokenization_spaces": False,
        "add_prefix_space": False, "bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "unk_token": None,
        "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"], "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
            for i, t in enumerate(SPECIAL_TOKENS)
        },
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2, ensure_ascii=False)
        f.write("\n")


def check(tokenizer):
    """Any UTF-8 text and every chat document must survive encode and decode."""
    for text in ["Zoë said: «Привет, 世界!» 🦊\n\ttab  two spaces", "e\u0301 \u200b \U0001F469\u200d\U0001F680", stories.document("tokenizer", 7, 1.0)]:
        ids = tokenizer.encode(text).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            sys.exit(f"the tokenizer does not round-trip {text!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--documents", type=int, default=40000)
    args = parser.parse_args()
    tokenizer = train(args.documents)
    check(tokenizer)
    save(tokenizer, args.out)


if __name__ == "__main__":
    main()
