"""Writes smollm2-logits.json: logits and greedy tokens of SmolLM2-135M-Instruct.

    python3 make_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf

The GGUF's weights are dequantised and run in float32, rotary pairs interleaved as stored.
Needs numpy, gguf and tokenizers; about a minute.
"""

import json
import pathlib
import sys

import numpy as np

from reference import SmolLM2, greedy, margin

PASSAGE = (
    "The old lighthouse keeper climbed the stairs every evening at dusk, carrying a lamp and a small book. "
    "He read three pages, looked out over the dark water, and wrote down the names of 12 ships in 1897."
)
QUESTION = "What is the capital of France?"
PROMPTS = [
    QUESTION,
    "Write a short poem about the sea.",
    "Explain in two sentences how a bicycle stays upright.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is 17 + 25?",
    "List five fruits and their colours.",
]
PARIS = [504, 3575, 282, 4649, 314, 7042, 30, 2]


def rows(model, ids, positions):
    logits = model.decoder()(ids)
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    log_p = wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))
    nll = -log_p[np.arange(len(ids) - 1), ids[1:]]
    out = []
    for at in positions:
        best = np.argsort(-logits[at], kind="stable")[:20]
        out.append({"position": at, "ids": best.tolist(), "logits": [round(float(x), 5) for x in logits[at, best]]})
    return {"ids": ids, "perplexity": round(float(np.exp(nll.mean())), 4), "argmax": logits.argmax(-1).tolist(),
            "margins": [round(margin(row), 4) for row in logits], "top20": out}


def main():
    model = SmolLM2(sys.argv[1])
    text = model.encode(PASSAGE)
    chat = model.chat(QUESTION)
    assert len(text) >= 39 and len(chat) == 37, (len(text), len(chat))
    result = {
        "passage": {"text": PASSAGE, **rows(model, text, [0, 1, 5, 11, 18, 25, 33, len(text) - 1])},
        "chat": {"user": QUESTION, **rows(model, chat, [0, 1, 4, 12, 20, 28, 33, 36])},
        "greedy": [],
    }
    for user in PROMPTS:
        prompt = model.chat(user)
        ids, margins = greedy(model.decoder(), prompt, 48, stop=(2,))
        result["greedy"].append({"user": user, "prompt_ids": prompt, "ids": ids, "margins": [round(m, 4) for m in margins], "text": model.decode(ids)})
        print(repr(model.decode(ids)), "smallest margin", min(margins))
    assert result["greedy"][0]["ids"] == PARIS
    print("margins", result["greedy"][0]["margins"], "perplexities", result["passage"]["perplexity"], result["chat"]["perplexity"])
    path = pathlib.Path(__file__).parent / "smollm2-logits.json"
    path.write_text(json.dumps(result, ensure_ascii=False, indent=None, separators=(",", ":")).replace('{"user"', '\n{"user"') + "\n")


if __name__ == "__main__":
    main()
