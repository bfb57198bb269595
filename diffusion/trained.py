"""What some rows of the table need trained first: image models, distilled attention, a LoRA; kept with the clips."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

# Name -> trainer and its arguments; a name in braces is the folder of another of these.
COMMANDS = {
    "flux": "distill teacher flux --steps 3000 --lr 2e-3 --vae-steps 2000",
    "unet": "distill teacher unet --steps 3000 --lr 2e-3 --vae-steps 2000",
    "clear": "distill clear {flux} --radius 2 --pooled 3 --steps 1000",
    "linfusion": "distill linfusion {unet} --steps 1000",
    "lora": "train --lora --attention radial --times 2 --clips 96 --bf16 --steps 100 --prompts 0",
}


def key(name: str) -> str:
    """A name that changes with the command, and with those of what it starts from.

    >>> key("clear").startswith("clear-") and key("clear") != key("flux")
    True
    """
    words = [key(word[1:-1]) if word.startswith("{") else word for word in COMMANDS[name].split()]
    return f"{name}-{hashlib.sha256(' '.join(words).encode()).hexdigest()[:8]}"


def folder(root: Path, name: str) -> Path:
    """Where the trained thing lies below `root`; trains it first where it is missing.

    A training that was interrupted goes on, and of two processes one waits for the other.
    """
    import fcntl  # not on Windows, where the table can still be read

    out = root / "trained" / key(name)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "done").exists():
            from vision_attn.diffusion import distill, train

            trainer, *words = COMMANDS[name].split()
            words = [str(folder(root, word[1:-1])) if word.startswith("{") else word for word in words]
            main = {"distill": distill.main, "train": train.main}[trainer]
            main([*words, "--out", str(out), "--threads", str(torch.get_num_threads())])
            (out / "done").touch()
    return out
