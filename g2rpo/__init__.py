"""Online RL for flow-matching text-to-image models. The names below are loaded when they are first used."""

__version__ = "0.1.0"

FACE = dict(
    train='training.trainer', evaluate='training.evaluate', Config='training.config', presets='training',
    load_policy='models.loading', Method='core.method', METHODS='core.rows')   # name → module that has it

__all__ = ['__version__', *FACE]

def __getattr__(name: str):
    "A name of `FACE`, from its module."
    if name not in FACE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    module = import_module(f'{__name__}.{FACE[name]}')
    found = getattr(module, name, None) or import_module(f'{module.__name__}.{name}')
    globals()[name] = found
    return found

def __dir__(): return sorted(__all__)
