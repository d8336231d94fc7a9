__version__ = "0.1.0"

_LAZY = {
    "read_ct": "data.ct", "write_ct": "data.ct", "read_mask": "data.ct", "CTVolume": "data.ct", "to_video": "data.ct", "from_video": "data.ct",
    "sample_chest": "data.samples", "load_vae": "vaes.interface", "reconstruct": "reconstruction.operator", "image_metrics": "metrics.image", "settings": "settings",
}


def __getattr__(name):
    "The commonest names, imported when first used: `import fvae_nb` stays cheap"
    if name not in _LAZY: raise AttributeError(f"module 'fvae_nb' has no attribute {name!r}")
    from importlib import import_module
    value = getattr(import_module(f"fvae_nb.{_LAZY[name]}"), name) if name != "settings" else import_module("fvae_nb.settings")
    globals()[name] = value
    return value


def __dir__(): return sorted(set(globals()) | set(_LAZY))
