"""tw_jax: train and sample language models that reason in parallel threads.

`__init__.pyi` lists the public names for editors, type checkers and this file. A name is imported
when it is first used, because JAX takes seconds to load and grading workers do not need it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
