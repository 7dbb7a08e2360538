"""Which folders a wheel holds, and where: eval/, recipes/ and ds_configs/ go inside the package, as matrix_llm.eval.

At the top of site-packages, a package called `eval` would be in the way of other people's.
"""

from setuptools import find_packages, setup

INSIDE = ["eval", "recipes", "ds_configs"]

setup(
    packages=[
        *find_packages(include=["matrix_llm*"]),
        *(f"matrix_llm.{name}" for name in find_packages(include=["eval*"])),
        *("matrix_llm.recipes", "matrix_llm.recipes.ssl", "matrix_llm.ds_configs"),  # files alone, no modules
    ],
    package_dir={f"matrix_llm.{name}": name for name in INSIDE},
    package_data={
        "matrix_llm.diagnose": ["*.jinja"],
        "matrix_llm.publish": ["templates/*.jinja"],
        "matrix_llm.eval.report": ["*.j2"],
        "matrix_llm.recipes": ["*.yaml"],
        "matrix_llm.recipes.ssl": ["*.yaml"],
        "matrix_llm.ds_configs": ["*.json", "*.yaml"],
    },
)
