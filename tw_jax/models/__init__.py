"""Language models as pure functions. `presets` is imported when it is first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["presets"])
