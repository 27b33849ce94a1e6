"""Sphinx settings. Build with ``python -m sphinx -W --keep-going -b html docs docs/_build/html``
and run every code block with ``-b doctest``; neither needs a network."""

import os
import pathlib
import sys
import types

from sphinx.util.docutils import SphinxDirective

_DOCS = pathlib.Path(__file__).resolve().parent
_ROOT = _DOCS.parent
sys.path.insert(0, str(_ROOT))

# The examples write the digits here instead of into the reader's own TFDS folder. Both variables
# are read when jax and TFDS are imported, so they come before any import of the package.
os.environ.setdefault("TFDS_DATA_DIR", str(_DOCS / "_build" / "tfds"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "5")
# Compiling is most of what the examples do; with these, small CPU programs take half as long.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

from ttt_jax import __version__  # noqa: E402

project = "ttt_jax"
author = "The ttt_jax authors"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Fields read like arguments, under their own heading and without the annotations' long names.
napoleon_custom_sections = [("Attributes", "params_style")]

# Examples in docstrings use the names of their own module, which `pytest --doctest-modules ttt_jax`
# gives them; here only the blocks of the pages run.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
import jax
jax.config.update("jax_default_matmul_precision", "highest")
"""


class _Alignment(SphinxDirective):
    """What a record of ``experiments.diagnose`` shows: correlation, plot, means."""

    required_arguments = 1

    def run(self):
        from docs import alignment
        from experiments.report import committed

        name = self.arguments[0]
        self.env.note_dependency(str(_ROOT / "experiments" / "results" / f"{name}.json"))
        return self.parse_text_to_nodes(alignment.markdown(committed.read(name)))


def _restore_signatures(app, env):
    """Takes back what autodoc_preserve_defaults wrote into the library's functions.

    The blocks of the pages are run afterwards, and the programs read defaults off signatures.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ttt_jax":
            for value in list(vars(module).values()):
                if isinstance(value, types.FunctionType):
                    value.__dict__.pop("__signature__", None)


def setup(app):
    app.add_directive("alignment", _Alignment)
    app.connect("env-updated", _restore_signatures)


html_theme = "furo"
html_title = f"ttt_jax {release}"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f4e79", "color-brand-content": "#1f4e79"},
    "dark_css_variables": {"color-brand-primary": "#8ab4d8", "color-brand-content": "#8ab4d8"},
}
