"Shared by the tests: rewards without packages, prompts, and configs of a model that is small."
from g2rpo import METHODS, presets

PROMPTS = [f'a sign that says "{i:03d}" in red' for i in range(8)]

def left_of_right(images, prompts):
    "How much darker the left half of an image is."
    half = images.shape[-1]//2
    return images[..., half:].mean((1, 2, 3)) - images[..., :half].mean((1, 2, 3))

def brightness(images, prompts):
    "Mean of all pixels."
    return images.mean((1, 2, 3))

def row(name, **changes):
    "A row of the method table that fits short grids and small groups."
    from dataclasses import replace
    method = METHODS[name]
    window = method.window and replace(method.window, size=2)
    return replace(method, **dict(window=window, starts=min(method.starts, 2)) | changes)

def small(model, **changes):
    "A config of a few seconds on `model`."
    short = dict(model=str(model), precision='no', iterations=1, T=4, group_size=3, prompts_per_iteration=2)
    return presets.tiny(**short | dict(method=row('g2rpo', granularities=(1, 2))) | changes)

def free_port():
    "A port of this machine that nothing listens on."
    import socket
    with socket.socket() as one:
        one.bind(('localhost', 0))
        return one.getsockname()[1]

def count_lines(file):
    "Lines of a file that may not be there yet."
    return file.read_text().count('\n') if file.exists() else 0

def thin_transformer(pipe):
    "A random transformer of two thin blocks for a pipeline of Flux.1."
    import torch
    from diffusers import FluxTransformer2DModel
    torch.manual_seed(0)
    thin = dict(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=32,
                axes_dims_rope=(8, 12, 12))
    return FluxTransformer2DModel.from_config(dict(pipe.transformer.config) | thin)
