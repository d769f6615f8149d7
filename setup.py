"Everything about the package stands in settings.ini; this file hands it to setuptools."
import re
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


def for_package_index(readme: str) -> str:
    "The front page with absolute links: what it links to lies in the repository, not beside the page of a package index."
    def absolute(link: re.Match) -> str:
        if not link["target"]: return link[0]  # code
        kind = "raw" if link["text"].startswith("!") else "blob"  # an image, or a page
        return f"{link['text']}({cfg['git_url']}/{kind}/{cfg['branch']}/{link['target']})"

    code = r"```.*?```|`[^`\n]*`"
    relative = r"(?P<text>!?\[(?:[^][`]|`[^`\n]*`)*\])\((?!\w+:|#)(?P<target>[^)\s]+)\)"
    return re.sub(f"{code}|{relative}", absolute, readme, flags=re.DOTALL)


extras = {key.removesuffix("_requirements"): entries(key) for key in cfg if key.endswith("_requirements")}
extras["all"] = [line for extra in ("diffusion", "ui", "ray") for line in extras[extra]]

if __name__ == "__main__":
    setup(
        name=cfg["lib_name"],
        version=cfg["version"],
        description=cfg["description"],
        long_description=for_package_index((root / "README.md").read_text(encoding="utf-8")),
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
