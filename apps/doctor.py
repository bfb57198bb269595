"""`vision-attn doctor`: what is installed, what the machine has, and what can run."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

# Package -> what needs it; the first ones are needed for `generate`.
NEEDED = ("torch", "diffusers", "transformers", "safetensors", "av", "pillow", "scikit-image", "matplotlib")
OPTIONAL = ("accelerate", "peft", "timm", "open_clip_torch", "triton", "natten")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def doctor(as_json: bool) -> None:
    """Report versions, devices and backends, and whether the main job can run (exit code 1 when it cannot).

    \b
    Examples:
      vision-attn doctor
      vision-attn doctor --json
    """
    found = examine()
    click.echo(json.dumps(found) if as_json else describe(found))
    if found["problems"]:
        raise click.exceptions.Exit(1)


def examine() -> dict[str, Any]:
    """Versions, devices, backends and the built-in model, as JSON values; `problems` is empty when all is well."""
    packages = {name: _version(name) for name in ("vision-attn", *NEEDED, *OPTIONAL)}
    problems = [f"{name} is not installed: pip install 'vision-attn[apps]'" for name in NEEDED if not packages[name]]
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": [],
        "backends": {},
        "built_in_model": None,
        "problems": problems,
    }
    if not packages["torch"]:
        return found
    import torch

    from vision_attn import Neighborhood, explain

    problem = {"pattern": Neighborhood(window=7), "grid": (16, 16), "heads": 4, "head_dim": 64}
    kinds = [("cpu", torch.float32)] + [("cuda", torch.bfloat16)] * torch.cuda.is_available()
    found["devices"].append({"device": "cpu", "name": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"})
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        found["devices"].append({"device": f"cuda:{index}", "name": f"{card.name}, {memory}"})
    for device, dtype in kinds:
        key = f"{device}, {str(dtype).removeprefix('torch.')}"
        found["backends"][key] = explain(**problem, dtype=dtype, device=device).to_dict()["backends"]
    if packages["diffusers"]:
        from vision_attn.diffusion.loading import LoadError, inspect_model

        try:
            info = inspect_model()
            found["built_in_model"] = {"folder": info.source, "pipeline": info.pipeline, "defaults": info.defaults}
        except LoadError as error:
            problems.append(str(error))
    return found


def describe(found: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"python {found['python']} on {found['platform']}"]
    lines += [f"  {name:<16} {number or 'not installed'}" for name, number in found["packages"].items()]
    lines += ["devices"] + [f"  {entry['device']:<16} {entry['name']}" for entry in found["devices"]]
    for kind, backends in found["backends"].items():
        lines.append(f"backends on {kind} (Neighborhood(window=7) on 16 x 16 tokens, 4 heads of 64)")
        lines += [f"  {b['backend']:<16} {b['status']:<8} {'; '.join(b['reasons'])}".rstrip() for b in backends]
    model = found["built_in_model"]
    lines.append(f"built-in model     {model['folder'] if model else 'missing'}")
    lines += [f"PROBLEM {problem}" for problem in found["problems"]] or ["no problems found"]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
