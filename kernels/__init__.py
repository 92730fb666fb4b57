"""Kernels: code that computes an op on a device, the table of them, and how each wants its weights packed."""

if __name__ != "qpass.kernels":
    # Python was started in the checkout, where this folder hides Hugging Face's package `kernels`, which Transformers
    # asks for when it loads a model. Stand aside: give what is installed elsewhere, or a package with nothing in it.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _checkout = Path(__file__).resolve().parent.parent
    _installed = PathFinder.find_spec(__name__, [p for p in sys.path if Path(p or ".").resolve() != _checkout])
    __path__ = []
    if _installed is not None and _installed.loader is not None:
        sys.modules[__name__] = module_from_spec(_installed)
        _installed.loader.exec_module(sys.modules[__name__])
