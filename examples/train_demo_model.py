"""Train the demo model that ships with piecework.

A small Llama (2.75 M parameters) learns the language reference that every Python installation carries in
`pydoc_data/topics.py`, well enough to continue a sentence of it. The result is a directory in Hugging Face layout:
config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json and tokenizer_config.json.

    python examples/train_demo_model.py --out src/piecework/demo_model

One CPU core needs about 20 minutes for the default number of steps. The seed is fixed, so the same versions of Python
and torch on the same kind of machine give the same model; another Python version carries another text.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"
# The model only continues text, so a conversation is shown to it as paragraphs.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}\n\n{% endif %}{% endfor %}"
PROMPTS = (
    'The "for" statement is used to',
    "The for statement is used to",
    "Dictionaries can be created by",
    "A class definition is",
    "When an exception is raised,",
)


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, apart from the text."""

    steps: int
    seed: int = 1234
    vocab: int = 2048
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 512
    context: int = 512
    # One batch holds tokens_per_step tokens, as a few long windows or as many short ones (chosen per step): the long
    # ones teach the whole context, the short ones what to do at the start of a prompt.
    tokens_per_step: int = 2048
    windows: tuple[int, ...] = (128, 512)
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    unquoted: float = 0.3


def corpus() -> str:
    """Return all topics as one text, each ended by END, with paragraphs of prose unwrapped to one line each."""
    return "".join(_unwrap(text) + END for text in topics.values())


def _unwrap(text: str) -> str:
    """Join the lines of prose and drop its indentation; leave headings, grammar, tables and code as they are."""
    blocks = []
    for block in re.split(r"\n{2,}", text.strip()):
        lines = [line.strip() for line in block.split("\n")]
        bullet = re.match(r"(\*|\d+\.) ", lines[0])
        full = all(len(line) > 50 for line in lines[:-1]) and re.search(r"[.:]$", lines[-1])
        prose = full and re.match(r"[A-Z\"*“]", lines[0]) and not any(re.search(r"::=|>>>", line) for line in lines)
        blocks.append(" ".join(lines) if bullet or prose else block)
    return "\n\n".join(blocks)


class Windows:
    """Cuts training windows out of the text.

    One half starts anywhere at a word, the other where a sentence starts, as a prompt does. Some lose their double
    quotes, because people who type a prompt write: The for statement.
    """

    def __init__(self, text: str, *, tokenizer: Tokenizer, seed: int) -> None:
        self._text = text
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._words = [m.end() for m in re.finditer(r"\s+|" + re.escape(END), text)]
        self._sentences = [0, *(m.end() for m in re.finditer(r"[.:]\s+(?=[A-Z\"])|\n\n|" + re.escape(END), text))]

    def batch(self, *, count: int, length: int, unquoted: float) -> torch.Tensor:
        """Return tokens [count, length], int64; the part `unquoted` of the windows has no double quotes."""
        return torch.tensor([self._window(length, index=i, unquoted=unquoted) for i in range(count)])

    def _window(self, length: int, *, index: int, unquoted: float) -> list[int]:
        # Eight characters make at least one token, nearly always; where they don't, or the text ends, try elsewhere.
        while True:
            start = self._random.choice(self._sentences if index % 2 else self._words)
            text = self._text[start : start + 8 * length]
            if self._random.random() < unquoted:
                text = text.replace('"', "")
            tokens: list[int] = self._tokenizer.encode(text).ids
            if len(tokens) > length:
                return tokens[:length]


def train_tokenizer(text: str, *, vocab: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of `vocab` entries; entry 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END), trainer)
    return tokenizer


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """Return the untrained model in float32."""
    config = LlamaConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        rms_norm_eps=1e-5,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def learning_rate(step: int, *, recipe: Recipe) -> float:
    """Return the rate at `step`: a linear warm-up, then a cosine to a fiftieth of the peak."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train(recipe: Recipe, *, out: Path, save_every: int, threads: int) -> None:
    """Train and save to `out`, also every `save_every` steps, so that an early stop leaves a usable model."""
    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    text = corpus()
    tokenizer = train_tokenizer(text, vocab=recipe.vocab)
    windows = Windows(text, tokenizer=tokenizer, seed=recipe.seed)
    model = build_model(recipe)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(tokenizer.encode(text).ids)} tokens of text, {num_parameters} parameters", flush=True)

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    began, mean = time.monotonic(), None
    for step in range(recipe.steps):
        window = recipe.windows[step % len(recipe.windows)]
        count = recipe.tokens_per_step // window
        batch = windows.batch(count=count, length=window + 1, unquoted=recipe.unquoted)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe=recipe)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 50 == 0:
            print(f"step {step} loss {mean:.3f} {time.monotonic() - began:.0f}s", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            save(model, tokenizer, out=out, context=recipe.context)
            print(f"saved after step {step + 1}, loss {mean:.3f}", flush=True)
    for prompt in PROMPTS:
        print(f"--- {prompt}{continuation(out, prompt=prompt)}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, *, out: Path, context: int) -> None:
    """Write the model in bfloat16 and its tokenizer to `out`, in Hugging Face layout."""
    out.mkdir(parents=True, exist_ok=True)
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored = stored.to(torch.bfloat16)
    stored.config.dtype = torch.bfloat16
    stored.generation_config.eos_token_id = 0
    stored.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def continuation(path: Path, *, prompt: str, num_tokens: int = 60) -> str:
    """Return what the model in `path` says greedily after `prompt`."""
    model = LlamaForCausalLM.from_pretrained(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    full = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(full[0, ids.shape[1] :].tolist())


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("src/piecework/demo_model"), help="directory to write")
    parser.add_argument("--steps", type=int, default=3200, help="optimizer steps of 2048 tokens each")
    parser.add_argument("--save-every", type=int, default=400, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    train(Recipe(steps=options.steps), out=options.out, save_every=options.save_every, threads=options.threads)


if __name__ == "__main__":
    main()
