# %% [markdown]
# # Checks
#
# > TITLE

# %%
#| default_exp plan.checks

# %%
#| export
import json
import os
import torch
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from safetensors import safe_open, SafetensorError
from g2rpo.errors import InputError
from g2rpo.models.families import FAMILIES
from g2rpo.plan.blueprint import local_folder, pipeline_class
from g2rpo.plan.memory import GIB
from g2rpo.rewards.checkpoints import ASSETS, find_asset, SCORER_ASSETS
from g2rpo.rewards.ocr import INSTALL_HINTS, OCR_EXTRA, READER_PACKAGES
from g2rpo.training.config import Config
from g2rpo.training.prompts import load_prompts

# %% [markdown]
# ## What is looked at
#
# Each check gives findings: fine, or what is wrong and what to do about it.

# %%
#| export
@dataclass(frozen=True)
class Finding:
    "What a check found."
    what: str
    text: str
    fine: bool = True

    def __str__(self): return f'{"ok  " if self.fine else "FAIL"}  {self.what:9} {self.text}'

REQUIRED_PACKAGES = ('torch', 'diffusers', 'transformers', 'accelerate', 'peft', 'safetensors')

def check_packages(cfg: Config) -> Iterator[Finding]:
    "Versions, and what the scorers need besides."
    found = {name: installed_version(name) for name in REQUIRED_PACKAGES}
    yield Finding('packages', ', '.join(f'{name} {v or "missing"}' for name, v in found.items()), all(found.values()))
    for name in (*cfg.rewards, *cfg.panel):
        package, fix = ('open_clip_torch', 'pip install "g2rpo[rewards]"') if name in ('hps21', 'clip', 'clip384') else (READER_PACKAGES.get(name), INSTALL_HINTS.get(READER_PACKAGES.get(name), OCR_EXTRA))
        if package and not installed_version(package):
            yield Finding('packages', f'{name} needs {package}; run: {fix}', False)

def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

def free_memory(device: torch.device) -> int:
    "Bytes that this process can still take."
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    return main_memory()

def main_memory(cgroup: Path = Path('/sys/fs/cgroup')) -> int:
    "Bytes of main memory that can still be taken, within the limit of the container where there is one."
    import psutil
    free, limit = psutil.virtual_memory().available, cgroup/'memory.max'
    if limit.is_file() and (said := limit.read_text().strip()).isdigit():
        kept = dict(line.split() for line in (cgroup/'memory.stat').read_text().splitlines())
        free = min(free, int(said) - int((cgroup/'memory.current').read_text()) + int(kept.get('inactive_file', 0)))    # cached files make room
    return free

def check_devices(cfg: Config, device: torch.device, processes: int) -> Iterator[Finding]:
    "What computes."
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{os.cpu_count()} CPU cores'
    text = f'{name}, {free_memory(device)/GIB:.1f} GiB free; planned for {processes} process{"es" if processes > 1 else ""}'
    here = torch.cuda.device_count() if device.type == 'cuda' else processes
    odd = cfg.prompts_per_iteration % processes
    yield Finding('device', text + (f', of which {here} here' if here < processes else '') + (f'; prompts_per_iteration={cfg.prompts_per_iteration} cannot be dealt evenly to them' if odd else ''), not odd)

def missing_parts(folder: Path) -> list[str]:
    "Parts of a pipeline folder whose weights are not all there as whole safetensors files, under the names that diffusers and transformers open."
    parts = ('transformer', 'vae', *FAMILIES[pipeline_class(folder)].encoders)
    def whole(part):
        stem = 'model' if part.startswith('text_encoder') else 'diffusion_pytorch_model'
        listed = folder/part/f'{stem}.safetensors.index.json'
        names = set(json.loads(listed.read_text())['weight_map'].values()) if listed.is_file() else {f'{stem}.safetensors'}
        return all(opens_as_safetensors(folder/part/name) for name in names)
    return [part for part in parts if not whole(part)]

def opens_as_safetensors(file: Path) -> bool:
    "Whether a safetensors file is there and as long as its header says."
    try:
        with safe_open(file, 'pt'):
            return True
    except (OSError, SafetensorError):
        return False

def check_model(cfg: Config) -> Iterator[Finding]:
    "Whether the pipeline is here, whole and of a family that is known."
    folder = local_folder(cfg.model, cfg.revision)
    if folder is None or not (folder/'model_index.json').is_file():
        yield Finding('model', f'{cfg.model} is not on this machine; run: hf download {cfg.model}' + (f' --revision {cfg.revision}' if cfg.revision else ''), False)
        return
    try:
        kind = pipeline_class(folder)
    except InputError as error:
        yield Finding('model', str(error), False)
        return
    if kind not in FAMILIES:
        yield Finding('model', f'{cfg.model} is a {kind}; supported are {", ".join(FAMILIES)}', False)
    elif gone := missing_parts(folder):
        yield Finding('model', f'{folder} lacks whole weights of {", ".join(gone)} as safetensors; ' + ("put them there" if Path(cfg.model).exists() else f"run: hf download {cfg.model}"), False)
    else:
        yield Finding('model', f'{cfg.model}, a {kind}')

def check_assets(cfg: Config) -> Iterator[Finding]:
    "Checkpoints of the scorers, held to their manifests."
    for name in dict.fromkeys(asset for reward in (*cfg.rewards, *cfg.panel) for asset in SCORER_ASSETS.get(reward, ())):
        try:
            yield Finding('scorer', f'{name} ({ASSETS[name].repo}) is in {find_asset(name)}, sha256 verified')
        except InputError as error:
            yield Finding('scorer', str(error), False)

def check_prompts(cfg: Config) -> Iterator[Finding]:
    "The training prompts, and those of the panel."
    sets = [(cfg.prompts, cfg.rewards, 'prompts_per_iteration', cfg.prompts_per_iteration)] + ([(cfg.panel_prompts, cfg.panel, 'panel_size', cfg.panel_size)] if cfg.panel else [])
    for source, rewards, name, least in sets:
        try:
            prompts = load_prompts(source, rewards)
        except InputError as error:
            yield Finding('prompts', str(error), False)
        else:
            yield Finding('prompts', f'{len(prompts)} from {source}, longest {max(map(len, prompts))} characters' + ('' if len(prompts) >= least else f', fewer than {name}={least}'), len(prompts) >= least)
