"""Post-training quantization of diffusion models, one notebook per idea.

Every public name of every notebook is available here, e.g. `segquant_nb.Quantizer`; its module is
imported when the name is first used, so that `import segquant_nb` itself costs nothing.
"""
__version__ = "0.1.0"

from importlib import import_module as _import_module


def _home_modules() -> dict[str, str]:
    "Public name → module that defines it, or is it, from the index that nbdev keeps"
    from ._modidx import d
    return {full.rsplit('.', 1)[1]: module for module, symbols in d['syms'].items()
            for full in (module, *symbols) if full == module or full.rsplit('.', 1)[0] == module}


def __getattr__(name):
    module = None if name.startswith('_') else _home_modules().get(name)
    if module is None:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = _import_module(module)
    if module != f'{__name__}.{name}': value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *(n for n in _home_modules() if not n.startswith('_'))})
