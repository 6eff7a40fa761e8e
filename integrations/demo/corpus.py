"""What the embedded language model learns from: the .py text of Python's own standard library, as one stream of tokens."""
from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CONTEXT = 1024  # tokens the model sees at once
END, PAD = "<|endoftext|>", "<|pad|>"

# encodings/ is character tables and pydoc_data/ is manual text: neither is the code that the model should learn to write.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}


def read_corpus(stdlib: Path) -> tuple[list[str], list[str]]:
    """Return (training texts, validation texts) of a standard library: every distinct .py file, in path order, 2% held out."""
    train, held_out, seen = [], [], set()
    for path in sorted(stdlib.rglob("*.py"), key=lambda p: p.relative_to(stdlib).as_posix()):
        name = path.relative_to(stdlib)
        if SKIPPED_FOLDERS.intersection(name.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n").strip()
        except UnicodeDecodeError:  # the tests hold files that are broken on purpose
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if not text or digest in seen:
            continue
        seen.add(digest)
        (held_out if is_held_out(name) else train).append(text + "\n")
    if not held_out:
        raise ValueError(f"read_corpus: {stdlib} holds {len(train)} usable .py files and none to validate on; pass a Python's lib folder")
    return train, held_out


def is_held_out(name: Path) -> bool:
    """Whether a file is for validation. By the hash of its path below the library, so it keeps its side from one Python to the next."""
    return int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:4], "big") % 50 == 0


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of `vocab_size` entries; digits stay single, or merges go to the tests' constants."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        length=len(texts),
    )
    # As Llama's own tokenizer does: a prompt is the start of a file, or the model must guess how deep it is indented.
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))])
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str], device: torch.device) -> torch.Tensor:
    """Return one int64 tensor of all texts, an <|endoftext|> before each."""
    ids = [token for encoding in tokenizer.encode_batch_fast(texts) for token in encoding.ids]
    return torch.tensor(ids, dtype=torch.int64, device=device)


def validation_windows(stream: torch.Tensor) -> torch.Tensor:
    """Return the stream's consecutive windows, [n, CONTEXT + 1]; of a short stream its only, shorter one."""
    width = min(CONTEXT + 1, len(stream))
    return stream[: len(stream) // width * width].view(-1, width)
