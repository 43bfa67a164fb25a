"""Writes smollm2-dflash.json: a DFlash drafter's acceptance on SmolLM2, greedy.

    python3 smollm2_dflash.py SmolLM2-135M-Instruct.Q4_1.gguf ../models/smollm2-135m-dflash

The draft-and-verify loop in numpy float32, with caches for target and draft, full drafted width,
96 new tokens. Every output is compared with plain greedy decoding. Needs numpy, gguf, tokenizers;
some minutes.
"""

import json
import pathlib
import sys

import numpy as np

from reference import DFlash, SmolLM2, greedy, load_weights, margin

NEW, END, TIE = 96, 2, 0.02
PROMPTS = {
    "chat": [
        "What should I pack for a weekend trip to the mountains?",
        "Can you explain why the sky is blue?",
        "I have a job interview tomorrow. How should I prepare for it?",
    ],
    "code": [
        "Write a Python function that checks whether a string is a palindrome.",
        "Write a Python function that returns the largest element of a list without using max.",
        "Write a Python class for a stack with push, pop and peek methods.",
    ],
    "prose": [
        "The train left the station a little after midnight, and for a long while nobody in the carriage spoke. Then the old man by the window",
        "It was generally agreed in the village that Mr. Harding was a man of sense and fortune, and that his daughters",
        "In the beginning the valley was covered by a great forest, and the people who lived there",
    ],
    "maths": [
        "Tom has 12 apples. He gives 5 to Anna and buys 8 more. How many apples does he have now?",
        "Solve for x: 3x + 7 = 22.",
        "What is the area of a rectangle with a length of 9 cm and a width of 4 cm?",
    ],
}


def speculate(target, draft, embed, prompt):
    """Output ids, their margins, and the accepted drafts of each step."""
    taps, block = draft.config["dflash_config"]["target_layer_ids"], draft.config["block_size"]
    logits, features = target(prompt, taps)
    ids, margins, accepted = [int(logits[-1].argmax())], [margin(logits[-1])], []
    while len(ids) < NEW and ids[-1] != END:
        draft.inject(features)
        assert draft.length == target.length == len(prompt) + len(ids) - 1
        width = min(block, NEW - len(ids) + 1)
        hidden = draft.draft(ids[-1], embed, width)[2]
        drafts = target.head(hidden[1:]).argmax(-1).tolist()
        start = target.length
        logits, features = target([ids[-1]] + drafts, taps)
        chosen = logits.argmax(-1).tolist()
        a = 0
        while a < len(drafts) and drafts[a] == chosen[a]:
            a += 1
        new = chosen[: a + 1]
        if END in new:
            new = new[: new.index(END) + 1]
            a = len(new) - 1
        new = new[: NEW - len(ids)]
        ids += new
        margins += [margin(row) for row in logits[: len(new)]]
        accepted.append(len(new) - 1)
        target.crop(start + len(new))
        features = features[: len(new)]
    return ids, margins, accepted


def main():
    model = SmolLM2(sys.argv[1])
    folder = pathlib.Path(sys.argv[2])
    config = json.loads((folder / "config.json").read_text())
    weights = load_weights(folder / "model.safetensors", np.float32)
    embed = model.weights["embed_tokens.weight"]
    runs = []
    for domain, prompts in PROMPTS.items():
        for text in prompts:
            prompt = model.encode(text) if domain == "prose" else model.chat(text)
            ids, margins, accepted = speculate(model.decoder(), DFlash(config, weights), embed, prompt)
            plain, plain_margins = greedy(model.decoder(), prompt, NEW, stop=(END,))
            differ = next((i for i, (a, b) in enumerate(zip(ids, plain)) if a != b), None)
            if differ is None:
                assert len(ids) == len(plain)
            else:
                assert min(margins[differ], plain_margins[differ]) < TIE, (text, differ, margins[differ])
            assert sum(accepted) + len(accepted) + 1 == len(ids)
            mean = (len(ids) - 1) / len(accepted)
            runs.append({"domain": domain, "prompt": text, "chat": domain != "prose", "prompt_ids": prompt, "ids": ids,
                         "steps": len(accepted), "accepted": accepted, "mean_length": round(mean, 4),
                         "plain_differs_at": differ, "margins": [round(m, 4) for m in margins], "text": model.decode(ids)})
            print(domain, f"{mean:.2f}", "ties" if differ is not None else "equal", f"smallest margin {min(margins):.4f}", repr(model.decode(ids)[-50:]), flush=True)
    overall = lambda rs: round(sum(len(r["ids"]) - 1 for r in rs) / sum(r["steps"] for r in rs), 4)
    means = {domain: overall([r for r in runs if r["domain"] == domain]) for domain in PROMPTS} | {"all": overall(runs)}
    print(means)
    text = json.dumps({"new_tokens": NEW, "end_token": END, "block_size": config["block_size"], "means": means, "runs": runs}, ensure_ascii=False, separators=(",", ":"))
    (pathlib.Path(__file__).parent / "smollm2-dflash.json").write_text(text.replace('{"domain"', '\n{"domain"') + "\n")


if __name__ == "__main__":
    main()
