"""Checks of the Android project without its tools: build files, resources, manifest, wrapper."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tomllib
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.examples.kotlin import ANDROID, GRADLE, SOURCES

MAIN = ANDROID / "app" / "src" / "main"
MANIFEST = MAIN / "AndroidManifest.xml"
RESOURCES = sorted((MAIN / "res").rglob("*.xml"))
BUILD = (ANDROID / "app" / "build.gradle.kts").read_text(encoding="utf-8")
CATALOG = tomllib.loads((ANDROID / "gradle" / "libs.versions.toml").read_text())
KEY = "{http://schemas.android.com/apk/res/android}"

OLDEST_GRADLE = (9, 6, 0)
"""What the release notes of the Android plugin 9.5 require."""

WRAPPER = "55243ef57851f12b070ad14f7f5bb8302daceeebc5bce5ece5fa6edb23e1145c"
"""The checksum that Gradle published for the wrapper of Gradle 9.4.1."""


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def resource_names() -> list[str]:
    """Return the name of every resource, such as `@string/app_name`, once per definition."""
    names = []
    for path in RESOURCES:
        folder = path.parent.name.split("-")[0]
        if folder == "values":
            entries = ElementTree.parse(path).getroot()
            names += [f"@{entry.tag}/{entry.attrib['name']}" for entry in entries]
        else:
            names.append(f"@{folder}/{path.stem}")
    return names


def referenced_names() -> set[str]:
    names: set[str] = set()
    for path in [MANIFEST, *RESOURCES]:
        names |= set(re.findall(r'"(@\w+/\w+)"', path.read_text(encoding="utf-8")))
    for source in SOURCES.values():
        names |= {f"@{kind}/{name}" for kind, name in re.findall(r"\bR\.(\w+)\.(\w+)", source)}
    return names


def application() -> ElementTree.Element:
    node = ElementTree.parse(MANIFEST).getroot().find("application")
    assert node is not None
    return node


def test_the_gradle_files_use_the_entries_of_the_catalog() -> None:
    used = {name for path in GRADLE for name in re.findall(r"libs\.([\w.]+)", path.read_text())}
    libraries = {name.replace("-", ".") for name in CATALOG["libraries"]}
    plugins = {"plugins." + name.replace("-", ".") for name in CATALOG["plugins"]}
    assert used == libraries | plugins
    entries = [*CATALOG["libraries"].values(), *CATALOG["plugins"].values()]
    versions = {entry["version"]["ref"] for entry in entries if "version" in entry}
    assert versions == set(CATALOG["versions"])
    (module,) = re.findall(r'include\("(.+?)"\)', (ANDROID / "settings.gradle.kts").read_text())
    assert (ANDROID / module.strip(":") / "build.gradle.kts").is_file()


def test_kotlin_is_the_one_in_the_android_plugin() -> None:
    assert numbers(CATALOG["versions"]["agp"]) >= (9,)
    names = {plugin["id"] for plugin in CATALOG["plugins"].values()}
    assert "org.jetbrains.kotlin.android" not in names
    assert not [path for path in GRADLE if "kotlinOptions" in path.read_text()]


def test_the_root_declares_every_plugin_that_the_app_applies() -> None:
    alias = re.compile(r"alias\((libs\.plugins\.[\w.]+)\)( apply false)?")
    root = alias.findall((ANDROID / "build.gradle.kts").read_text())
    assert {name for name, _ in root} == {name for name, _ in alias.findall(BUILD)}
    assert all(suffix for _, suffix in root)
    assert not any(suffix for _, suffix in alias.findall(BUILD))


def test_the_library_has_the_version_of_the_exporter() -> None:
    assert CATALOG["versions"]["executorch"] == version("executorch")


def test_the_versions_of_android_are_in_order() -> None:
    levels = dict(re.findall(r"(\w+Sdk) \{ version = release\((\d+)\) \}", BUILD))
    assert set(levels) == {"compileSdk", "targetSdk", "minSdk"}
    assert int(levels["minSdk"]) < int(levels["targetSdk"]) <= int(levels["compileSdk"])
    assert levels["minSdk"] == "27"  # Android 8.1
    assert "requires Android 8.1 or later" in (ANDROID / "README.md").read_text(encoding="utf-8")


def test_the_wrapper_fetches_a_gradle_that_the_plugin_accepts() -> None:
    lines = (ANDROID / "gradle/wrapper/gradle-wrapper.properties").read_text().splitlines()
    properties = dict(line.split("=", 1) for line in lines)
    address = properties["distributionUrl"].replace("\\:", ":")
    found = re.fullmatch(
        r"https://services\.gradle\.org/distributions/gradle-([\d.]+)-bin\.zip", address
    )
    assert found
    assert numbers(found[1]) >= OLDEST_GRADLE
    assert numbers(CATALOG["versions"]["agp"])[:2] == (9, 5)
    assert re.fullmatch("[0-9a-f]{64}", properties["distributionSha256Sum"])


def test_the_wrapper_is_the_published_one() -> None:
    jar = ANDROID / "gradle" / "wrapper" / "gradle-wrapper.jar"
    assert hashlib.sha256(jar.read_bytes()).hexdigest() == WRAPPER
    script = ANDROID / "gradlew"
    assert script.stat().st_mode & 0o111
    subprocess.run(["sh", "-n", str(script)], check=True)


def test_resources_are_defined_once_and_used() -> None:
    names = resource_names()
    assert sorted(names) == sorted(set(names))
    assert referenced_names() == set(names)


def test_the_manifest_names_the_activity_and_the_namespace() -> None:
    (activity,) = application().findall("activity")
    name = activity.attrib[f"{KEY}name"].removeprefix(".")
    assert f"class {name} : ComponentActivity" in SOURCES[name]
    (namespace,) = re.findall(r'namespace = "(.+)"', BUILD)
    assert all(source.startswith(f"package {namespace}\n") for source in SOURCES.values())


@pytest.mark.parametrize("attribute", ["icon", "roundIcon"])
def test_the_icons_are_adaptive_and_themed(attribute: str) -> None:
    folder, name = application().attrib[f"{KEY}{attribute}"].removeprefix("@").split("/")
    (path,) = (MAIN / "res").glob(f"{folder}-*/{name}.xml")
    icon = ElementTree.parse(path).getroot()
    assert icon.tag == "adaptive-icon"
    assert [layer.tag for layer in icon] == ["background", "foreground", "monochrome"]


def test_the_parts_of_the_icon_are_inside_of_the_safe_circle() -> None:
    drawing = ElementTree.parse(MAIN / "res" / "drawable" / "icon_foreground.xml").getroot()
    assert drawing.attrib[f"{KEY}viewportWidth"] == drawing.attrib[f"{KEY}viewportHeight"] == "108"
    (path,) = drawing.findall("path")
    arcless = re.sub(r"A\d+,\d+ 0 0,0 ", " ", path.attrib[f"{KEY}pathData"])
    points = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", arcless)]
    assert len(points) == 11
    assert all((x - 54) ** 2 + (y - 54) ** 2 <= 33**2 for x, y in points)


def test_the_model_is_never_backed_up() -> None:
    attributes = application().attrib
    assert attributes[f"{KEY}allowBackup"] == "false"
    folder, name = attributes[f"{KEY}dataExtractionRules"].removeprefix("@").split("/")
    rules = ElementTree.parse(MAIN / "res" / folder / f"{name}.xml").getroot()
    assert [section.tag for section in rules] == ["cloud-backup", "device-transfer"]
    for section in rules:
        assert {rule.tag for rule in section} == {"exclude"}
        domains = [rule.attrib["domain"] for rule in section]
        assert domains == ["root", "file", "database", "sharedpref", "external"]
    assert "File(context.noBackupFilesDir, ASSETS)" in SOURCES["Assets"]


def test_the_screen_reaches_the_edges() -> None:
    assert "enableEdgeToEdge()" in SOURCES["MainActivity"]
    assert "safeDrawingPadding()" in SOURCES["MainActivity"]
    assert application().attrib[f"{KEY}enableOnBackInvokedCallback"] == "true"


def test_libraries_are_extracted_for_qnn_only() -> None:
    assert 'val acceptsQnn = providers.gradleProperty("qnn").orNull == "accept"' in BUILD
    assert "useLegacyPackaging = acceptsQnn" in BUILD


def test_the_bundle_of_the_readme_is_ignored_by_git() -> None:
    folder = "examples/android/app/src/main/assets/bundle"
    readme = (ANDROID / "README.md").read_text(encoding="utf-8")
    assert f"--output {folder}" in readme
    ignored = (Path(__file__).parents[2] / ".gitignore").read_text(encoding="utf-8")
    assert f"{folder}/" in ignored
