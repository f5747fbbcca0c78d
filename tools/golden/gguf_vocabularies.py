"""Small vocabularies for the GGUF goldens: byte-level BPE for each splitting rule, and SentencePiece BPE."""

from collections import Counter

CORPUS = (
    "Once upon a time there was a little girl. She didn't know that they'll come; we've seen IT'S raining. "
    "In 2024 there were 1234567 birds, 42 cats and 7 dogs!!! The end...\n\n\tdef f(x):\n        return x ** 2\r\n"
    "Größe über naïve café. 東京は日本の首都です。 你好，世界！ Привет мир. مرحبا 한국어 \u00a0 \u3000wide. "
    "HTTPServer camelCase snake_case $100 50% (a+b)=c [x] {y} <z> #hash @at ~tilde `tick` a/b\\c \"quoted\" 'single' ½ ² "
    "ÀÉÎ ǅ ﬁ 𝐀 👩‍👩‍👧 🦙"
)

TEXTS = [
    "Once upon a time",
    " leading and trailing ",
    "a",
    "",
    "She didn't say IT'S 1234567 or 12 or ½²; they'LL come",
    "In 2024, $100 + 50% = (a+b)!!! ...\n\n\tdef f(x):\n        return x ** 2\r\n\r\n",
    "Größe über naïve café; ÀÉÎ ǅ ﬁ 𝐀",
    "東京は日本の首都です。 你好，世界！ 한국어",
    "Привет мир. مرحبا",
    "HTTPServer camelCase snake_case a/b\\c <z> #hash",
    "👩‍👩‍👧 🦙 \u00a0 \u3000wide  double   triple\t\ttabs",
    "<|start|>user\nhello<|end|> after",
    "word<|end|><|end|>  <|tool|> x",
]


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character of every byte."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in keep]
    return {b: chr(b) for b in keep} | {b: chr(256 + i) for i, b in enumerate(others)}


def train(words: list[list[str]], merges: int) -> list[tuple[str, str]]:
    """Plain BPE: the commonest pair, merged, again and again."""
    found = []
    for _ in range(merges):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
                i += 1
    return found


SPECIAL = [("<|start|>", 3), ("<|end|>", 3), ("<|tool|>", 4)]


def byte_level(pre: str | None, merges: int = 110, **extra) -> dict:
    characters = byte_characters()
    text = [characters[b] for b in CORPUS.encode()]
    # Windows over the whole text: merges also cross what the splitting rules cut, which must then not be used.
    words = [text[i:i + 40] for i in range(0, len(text), 40)]
    ranked = train(words, merges)
    tokens = [characters[b] for b in range(256)]
    for left, right in ranked:
        if left + right not in tokens:
            tokens.append(left + right)
    types = [1] * len(tokens)
    start = len(tokens)
    for token, kind in SPECIAL:
        tokens.append(token)
        types.append(kind)
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in ranked],
        "tokenizer.ggml.bos_token_id": start,
        "tokenizer.ggml.eos_token_id": start + 1,
    }
    if pre is not None:
        vocabulary["tokenizer.ggml.pre"] = pre
    return vocabulary | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


def sentence_piece(merges: int = 90, **extra) -> dict:
    text = list("\u2581" + CORPUS.replace(" ", "\u2581"))
    words = [text[i:i + 40] for i in range(0, len(text), 40)]
    ranked = train(words, merges)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    types, scores = [2, 3, 3] + [6] * 256, [0.0] * 259

    def add(token: str, kind: int) -> None:
        if token not in tokens:
            scores.append(-float(len(tokens) - 259))
            types.append(kind)
            tokens.append(token)

    for left, right in ranked:
        add(left + right, 1)
    # Characters come last, as in published vocabularies; some are left to their bytes.
    for character in sorted(set(text)):
        if character < "\u0100" or character in "\u2581日本мир" or any(character in pair for pair in ranked):
            add(character, 1)
    for token, kind in SPECIAL:
        add(token, kind)
    vocabulary = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return vocabulary | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


BYTE_LEVEL = [
    "default", "gpt-2", "llama-bpe", "qwen2", "stablelm2", "smollm", "deepseek-llm", "deepseek-coder", "deepseek-v3",
    "gpt-4o", "tekken", "glm4",
]
VOCABULARIES = {name: byte_level(name) for name in BYTE_LEVEL} | {
    "added": byte_level("qwen2", add_bos_token=True, add_eos_token=True),
    "spm": sentence_piece(),
    "spm_plain": sentence_piece(add_space_prefix=False, add_bos_token=False, add_eos_token=True),
}
