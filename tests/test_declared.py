"""All config classes of the package are found without importing it."""

import subprocess
import sys

from repo.documents import root_of
from repo.sources import ROOT, VERBS, has_config

from tw_jax.declared import declared
from tw_jax.fields import kinds, reachable

PRINTS = """
import sys
from tw_jax.declared import declared
found = declared()
print("tw_jax.programs.sft" in sys.modules or "jax" in sys.modules, found["Optim"][0])
"""


def test_every_class_that_a_verb_reaches_is_found_with_all_its_fields():
    found = declared()
    for verb in filter(has_config, VERBS):
        for name, cls in reachable(root_of(verb)).items():
            assert set(kinds(cls)) <= set(found[name]), name


def test_nothing_is_imported_to_find_them():
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "algorithm"]
