"""The cache of text embeddings: each prompt goes through the text encoders once, not once per iteration.

``FOLDER/ENCODER/``, where ENCODER identifies text encoders, tokenizers, text length and dtype, holds safetensors shards and
``index.json`` (prompt key -> shard). A shard appears by rename when complete, so a killed run loses at most one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastvideo_grpo.disk.durable_files import write_atomic
from fastvideo_grpo.disk.room import refusal
from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.model_files.selection import unread
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.prompts.images import image_digest

Conditioning = dict[str, Tensor]
"""What the network is told about a prompt: name -> tensor ``[1, ...]`` (one prompt) or ``[B, ...]`` (a micro-batch)."""

PROMPTS_PER_SHARD = 64
_SAMPLED_BLOCKS = 64
_BLOCK = 4096
_WEIGHTS = (".safetensors", ".bin")
_LOADED_FROM = (*_WEIGHTS, ".json", ".model")
_VOCABULARIES = ("merges.txt", "vocab.txt")


def encoder_identity(checkpoint: Path, components: Sequence[str], settings: dict[str, Any]) -> str:
    """A hash that changes when the embeddings would.

    Small files are read whole; of weight files the size, the safetensors header and 64 evenly spaced blocks of 4 KiB are
    (T5-XXL has 9.5 GB, and a run that finds its cache complete should not read them).
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for component in components:
        folder = checkpoint / component
        # What is loaded from; a download leaves folders of its own there, people their notes and other variants.
        left_out = unread(folder) if folder.is_dir() else ()
        loaded = (p for p in folder.glob("*") if p.suffix in _LOADED_FROM or p.name in _VOCABULARIES)
        for path in sorted(p for p in loaded if p.name not in left_out and p.is_file()):
            size = path.stat().st_size
            digest.update(f"{component}/{path.name}:{size}".encode())
            with path.open("rb") as file:
                if path.suffix not in _WEIGHTS:
                    digest.update(file.read())
                    continue
                if path.suffix == ".safetensors":
                    header = int.from_bytes(file.read(8), "little")
                    digest.update(file.read(min(header, size)))
                for block in range(_SAMPLED_BLOCKS):
                    file.seek(size * block // _SAMPLED_BLOCKS)
                    digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def _key(prompt: Prompt) -> str:
    """Id, text and image: an id whose text or image was changed must not find the old embedding."""
    parts = [prompt.id, prompt.text, *([] if prompt.image is None else [image_digest(prompt.image)])]
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:32]


class EmbeddingCacheError(UserError, OSError):
    """Embeddings cannot be written."""


class EmbeddingCache:
    """Embeddings on disk, shared by the ranks (one file system).

    Args:
        folder: the configured folder.
        identity: from :func:`encoder_identity`.
        dtype: floating tensors are stored in it.
    """

    def __init__(self, folder: str | Path, identity: str, dtype: torch.dtype, world: World) -> None:
        self.folder = Path(folder) / identity
        self.dtype = dtype
        self.world = world
        self._shard_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        if world.rank == 0:
            self._scan()
        self._shard_of = world.broadcast_object(self._shard_of)

    def _scan(self) -> None:
        for left in self.folder.glob(".*.saving-*"):  # of a killed run; younger ones may be another run's work
            if time.time() - left.stat().st_mtime > 3600:
                with suppress(OSError):  # others' cache that may be read only
                    left.unlink()
        index = self.folder / "index.json"
        listed = json.loads(index.read_text())["prompts"] if index.is_file() else {}
        present = {path.name for path in self.folder.glob("*.safetensors")}
        self._shard_of = {key: shard for key, shard in listed.items() if shard in present}
        for shard in sorted(present - set(self._shard_of.values())):  # written by a run that was killed before its index
            with safe_open(self.folder / shard, "pt") as file:
                self._shard_of.update({name.split("/")[0]: shard for name in file.keys()})  # noqa: SIM118

    def missing(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that have no embedding yet, each once."""
        return list({_key(p): p for p in prompts if _key(p) not in self._shard_of}.values())

    def check_writable(self) -> None:
        """Before encoders are loaded to fill it.

        Raises:
            EmbeddingCacheError: on every rank, if rank 0 cannot write there.
        """
        answer = self.world.broadcast_object(refusal(self.folder) if self.world.rank == 0 else None)
        if answer is not None:
            raise EmbeddingCacheError(
                f"prompts.embeddings={self.folder.parent} cannot be written: {answer.reason}; "
                f"{'free space there' if answer.full else 'repair it'}, choose another folder, or set it to none to encode "
                "prompts as they come"
            )

    def fill(
        self,
        prompts: Sequence[Prompt],
        encode: Callable[[list[Prompt]], list[Conditioning]],
        say: Callable[[str], None],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Encode what is missing; all ranks call this and share the work.

        The first prompt tells the size of all; the free disk is checked before the rest is encoded.

        Raises:
            EmbeddingCacheError: too little free disk (the message says how much is needed), or a rank could not write.
        """
        missing = self.missing(prompts)
        if not missing:
            return
        first = self._stored(encode(missing[:1])[0])
        size = sum(t.numel() * t.element_size() for t in first.values()) * len(missing)
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            say(
                f"encoding {len(missing)} prompts once: {_gigabytes(size)} of embeddings in {self.folder} "
                f"({_gigabytes(free)} free there)"
            )
            enough = size < 0.95 * free
        if not self.world.broadcast_object(enough if self.world.rank == 0 else None):
            raise EmbeddingCacheError(
                f"prompts.embeddings: {_gigabytes(size)} are needed in {self.folder} and less is free; point it at another "
                "disk, or set prompts.embeddings=none to encode prompts as they come"
            )
        mine = missing[self.world.rank :: self.world.size]
        error = None
        try:
            self._encode_share(mine, encode, progress)
        except (OSError, SafetensorError) as failure:  # every rank has to hear of it, or the others wait for this one
            error = f"prompts.embeddings: rank {self.world.rank} cannot write to {self.folder}: {failure}"
        errors = [text for text in self.world.all_gather_object(error) if text is not None]
        if errors:
            raise EmbeddingCacheError(errors[0])
        if self.world.rank == 0:
            self._scan()
            index = {"encoder": self.folder.name, "dtype": str(self.dtype), "prompts": self._shard_of}
            write_atomic(self.folder / "index.json", json.dumps(index, indent=1).encode())
        self._shard_of = self.world.broadcast_object(self._shard_of)

    def _encode_share(
        self,
        mine: Sequence[Prompt],
        encode: Callable[[list[Prompt]], list[Conditioning]],
        progress: Callable[[int, int], None],
    ) -> None:
        for start in range(0, len(mine), PROMPTS_PER_SHARD):
            batch = mine[start : start + PROMPTS_PER_SHARD]
            tensors = {}
            for done, prompt in enumerate(batch, start=start + 1):
                (embedding,) = encode([prompt])
                tensors.update({f"{_key(prompt)}/{name}": t for name, t in self._stored(embedding).items()})
                progress(done, len(mine))
            content = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:16]
            temporary = self.folder / f".{content}.saving-{os.getpid()}"
            save_file(tensors, temporary)
            temporary.rename(self.folder / f"{content}.safetensors")

    def _stored(self, conditioning: Conditioning) -> Conditioning:
        return {
            name: t.to("cpu", self.dtype if t.is_floating_point() else t.dtype).contiguous() for name, t in conditioning.items()
        }

    def get(self, prompt: Prompt) -> Conditioning:
        """The embedding of a prompt, tensors ``[1, ...]`` on the CPU in the cache's dtype.

        Raises:
            KeyError: the prompt was never encoded.
        """
        key = _key(prompt)
        if key not in self._shard_of:
            raise KeyError(f"no embedding of prompt {prompt.id!r} in {self.folder}")
        shard = self._shard_of[key]
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / shard, "pt")
        file = self._open[shard]
        return {name.split("/", 1)[1]: file.get_tensor(name) for name in file.keys() if name.startswith(key)}  # noqa: SIM118


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
