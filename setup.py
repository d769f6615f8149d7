"Everything about the package stands in settings.ini; this file hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]


def entries(key: str) -> list[str]:
    "The lines of an entry."
    return cfg[key].split("\n")[1:]


extras = {key.removesuffix("_requirements"): entries(key) for key in cfg if key.endswith("_requirements")}
extras["all"] = [line for extra in ("diffusion", "ui", "ray") for line in extras[extra]]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Natural Language :: English",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)),
    ],
    python_requires=cfg["python_requires"],
    packages=find_packages(include=["devsky_nb", "devsky_nb.*"]),
    include_package_data=False,
    package_data={"devsky_nb": ["py.typed", "*.pyi", "configs/*", "configs/*/*", "configs/*/*/*", "models/*/*", "models/*/*/*", "templates/*", "traces/*"]},
    install_requires=entries("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": entries("console_scripts"), "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
