"""Checks of the Xcode project without Xcode: settings, assets, privacy manifest, strings."""

from __future__ import annotations

import json
import plistlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openstep_parser import OpenStepDecoder

IOS = Path(__file__).parents[2] / "examples" / "ios"
APP = IOS / "LfmDemo"
ASSETS = APP / "Assets.xcassets"
PACKAGE = (IOS / "LfmKit" / "Package.swift").read_text(encoding="utf-8")
CONTENTS = sorted(ASSETS.rglob("Contents.json"))


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return OpenStepDecoder.ParseFromFile((IOS / "LfmDemo.xcodeproj/project.pbxproj").open())


def settings(project: dict[str, Any], name: str) -> set[str]:
    """Return the values of a build setting in all configurations that have it."""
    configurations = [
        o["buildSettings"] for o in project["objects"].values() if "buildSettings" in o
    ]
    return {values[name] for values in configurations if name in values}


def png_size_and_color(path: Path) -> tuple[int, int, int]:
    """Return width, height and color type of a PNG file."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, _, color = struct.unpack(">IIBB", data[16:26])
    return width, height, color


def test_the_project_refers_to_existing_objects_and_files(project: dict[str, Any]) -> None:
    objects: dict[str, dict[str, Any]] = project["objects"]

    def object_ids(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for inner in value.values():
                yield from object_ids(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from object_ids(inner)
        elif re.fullmatch(r"[0-9A-F]{23,24}", value):
            yield value

    assert project["rootObject"] in objects
    assert set(object_ids(objects)) <= set(objects)
    folders = [o["path"] for o in objects.values() if "SynchronizedRootGroup" in o["isa"]]
    packages = [o["relativePath"] for o in objects.values() if "LocalSwiftPackage" in o["isa"]]
    assert folders == ["LfmDemo"]
    assert packages == ["LfmKit"]
    assert all((IOS / path).is_dir() for path in (*folders, *packages))
    assert (IOS / packages[0] / "Package.swift").is_file()
    resources = {o["path"] for o in objects.values() if o.get("lastKnownFileType") == "folder"}
    assert resources == {"Bundle"}  # the output of step 1 of the README
    assert "--output examples/ios/Bundle" in (IOS / "README.md").read_text(encoding="utf-8")
    assert "examples/ios/Bundle/" in (IOS.parents[1] / ".gitignore").read_text(encoding="utf-8")


def test_xcode_16_and_later_read_the_format(project: dict[str, Any]) -> None:
    assert project["objectVersion"] == "77"  # a later format locks out Xcode 16


def test_project_and_package_agree(project: dict[str, Any]) -> None:
    platforms = dict(re.findall(r"\.(iOS|macOS)\(\.v(\d+)\)", PACKAGE))
    assert settings(project, "IPHONEOS_DEPLOYMENT_TARGET") == {platforms["iOS"] + ".0"}
    assert settings(project, "MACOSX_DEPLOYMENT_TARGET") == {platforms["macOS"] + ".0"}
    assert settings(project, "SWIFT_VERSION") == {"6.0"}
    assert PACKAGE.startswith("// swift-tools-version: 6.0\n")  # which implies Swift 6
    assert "swiftLanguageMode" not in PACKAGE


def test_the_package_depends_on_the_modules_that_it_imports() -> None:
    sources = (IOS / "LfmKit" / "Sources" / "LfmKit").glob("*.swift")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    modules = set(re.findall(r"^import (\w+)$", text, re.M))
    assert modules - {"CoreML", "Foundation"} == set(re.findall(r'product\(name: "(\w+)"', PACKAGE))


def test_the_settings_name_existing_assets(project: dict[str, Any]) -> None:
    (icon,) = settings(project, "ASSETCATALOG_COMPILER_APPICON_NAME")
    (accent,) = settings(project, "ASSETCATALOG_COMPILER_GLOBAL_ACCENT_COLOR_NAME")
    names = {path.name for path in ASSETS.iterdir() if path.is_dir()}
    assert names == {f"{icon}.appiconset", f"{accent}.colorset"}


@pytest.mark.parametrize("path", CONTENTS, ids=lambda path: path.parent.name)
def test_the_catalog_lists_its_files(path: Path) -> None:
    contents = json.loads(path.read_text(encoding="utf-8"))
    assert contents["info"] == {"author": "xcode", "version": 1}
    listed = [image["filename"] for image in contents.get("images", [])]
    stored = [file.name for file in path.parent.iterdir() if file.is_file() and file != path]
    assert sorted(listed) == sorted(stored)


def test_every_folder_of_the_catalog_has_contents() -> None:
    folders = {ASSETS, *(path for path in ASSETS.rglob("*") if path.is_dir())}
    assert folders == {path.parent for path in CONTENTS}


def test_the_icon_has_one_opaque_image_per_appearance() -> None:
    folder = ASSETS / "AppIcon.appiconset"
    images = json.loads((folder / "Contents.json").read_text())["images"]
    appearances = [image.get("appearances", [{}])[0].get("value") for image in images]
    assert appearances == [None, "dark", "tinted"]
    for image in images:
        width, height, color = png_size_and_color(folder / image["filename"])
        assert image["size"] == f"{width}x{height}" == "1024x1024"
        assert color in (2, 3)  # without alpha: colors, or a palette
        assert b"tRNS" not in (folder / image["filename"]).read_bytes()


def test_the_icons_of_both_apps_have_one_drawing() -> None:
    folder = IOS.parent / "android" / "app" / "src" / "main" / "res"
    drawing = (folder / "drawable" / "icon_foreground.xml").read_text()
    path = re.search(r'pathData="(.+?)"', drawing)
    assert path
    icon = (IOS / "icon.svg").read_text()
    assert f'd="{path[1]}"' in icon
    background = re.search(
        r'name="icon_background">(.+?)<', (folder / "values/colors.xml").read_text()
    )
    assert background
    assert f'fill="{background[1]}"' in icon


def test_the_accent_color_is_valid_in_both_appearances() -> None:
    contents = json.loads((ASSETS / "AccentColor.colorset" / "Contents.json").read_text())
    assert len(contents["colors"]) == 2
    for entry in contents["colors"]:
        assert entry["color"]["color-space"] == "srgb"
        components = entry["color"]["components"]
        assert set(components) == {"red", "green", "blue", "alpha"}
        channels = [components[name] for name in ("red", "green", "blue")]
        assert all(re.fullmatch("0x[0-9A-F]{2}", channel) for channel in channels)


def test_the_privacy_manifest_declares_nothing() -> None:
    declared = plistlib.loads((APP / "PrivacyInfo.xcprivacy").read_bytes())
    assert declared == {
        "NSPrivacyTracking": False,
        "NSPrivacyTrackingDomains": [],
        "NSPrivacyCollectedDataTypes": [],
        "NSPrivacyAccessedAPITypes": [],
    }


def test_the_app_calls_no_api_that_requires_a_reason() -> None:
    names = r"UserDefaults|AppStorage|systemUptime|mach_absolute_time|activeInputModes"
    names += r"|creationDate|modificationDate|contentModificationDateKey|creationDateKey"
    names += r"|volumeAvailableCapacity|systemFreeSize|systemSize|statfs|fstat|getattrlist"
    texts = [path.read_text(encoding="utf-8") for path in IOS.rglob("*.swift")]
    assert not [name for text in texts for name in re.findall(names, text)]


def test_the_string_catalog_has_the_strings_of_the_app() -> None:
    catalog = json.loads((APP / "Localizable.xcstrings").read_text(encoding="utf-8"))
    assert catalog["sourceLanguage"] == "en"
    starts = r"localized: |(?:Section|TextField|Button|Text|Label|navigationTitle)\(\s*"
    literals: set[str] = set()
    for path in APP.glob("*.swift"):
        found = re.findall(
            rf'(?:{starts})"((?:\\\([^)]*\)|[^"])*)"', path.read_text(encoding="utf-8")
        )
        literals |= {re.sub(r"\\\([^)]*\)", "%@", text) for text in found}
    assert set(catalog["strings"]) == literals
