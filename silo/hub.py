"""Data sets of the Hugging Face hub, and how their rows become documents.

Every data set names its fields and its licences in its own way. A recipe says how, in a few lines of YAML:

    fields:                       # ours → theirs; a dot reaches into a nested field
      text: text
      license: metadata.license
      owner: metadata.author
    licenses:                     # their spelling → SPDX; the first pattern that fits counts
      "*creativecommons.org/licenses/by/4.0*": CC-BY-4.0
    configs:                      # configuration (or folder) → licence, where rows do not state one
      pd_*: LicenseRef-PublicDomain

What no line names is read by the usual names of fields and licences, and what is not understood stays unknown, that is,
restricted. Recipes for the Open License Corpus and the Common Pile come with SILO, and are found by a data set's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from silo.config import load_config
from silo.documents import Document, document_from_record
from silo.errors import DataError, UsageError
from silo.findings import Note
from silo.licensing import COPYLEFT, NO_LICENSE, normalize_license, tier_of

RECIPES = Path(__file__).with_name("recipes")
OURS = ("id", "text", "prompt", "completion", "license", "owner", "source", "title")
_USUAL = {"owner": ("owner", "author", "authors"), "title": ("title", "name")}
"""Fields that go by other names as well."""
_MORE = re.compile(r"[,;&|+\n]|://.*://|\b(?:and|but|except|non?|not|only|plus|unless|with|without)\b", re.IGNORECASE)
"""What tells that a licence's name is not all that is said."""


@dataclass(frozen=True)
class Recipe:
    """How the rows of a data set become documents."""

    fields: dict = field(default_factory=dict)
    """Our field → the name of theirs."""
    licenses: dict = field(default_factory=dict)
    """Pattern of a licence as they spell it, in any case → SPDX."""
    configs: dict = field(default_factory=dict)
    """Pattern of a configuration's or a folder's name → the licence of its rows."""
    datasets: list = field(default_factory=list)
    """Patterns of the data sets that this recipe is for."""

    def __post_init__(self) -> None:
        for name in self.fields:
            if name not in OURS:
                raise UsageError(f"recipe: fields has {name!r}; expected some of {', '.join(OURS)}")

    def license(self, raw: Any, config: str) -> str:
        """A row's licence: what the row states, else what its configuration says; unknown spellings stay. Of several
        licences, all hold."""
        stated = [str(each).strip() for each in (raw if isinstance(raw, list | tuple) else [raw or ""])]
        read = [self._spelled(each) for each in stated if each]
        if not read:
            return next((str(known) for pattern, known in self.configs.items() if fnmatchcase(config, pattern)), "")
        return read[0] if len(read) == 1 else " AND ".join(f"({each})" for each in read)

    def _spelled(self, stated: str) -> str:
        """One licence by their spelling or by the usual names. A pattern that frees does not fit what says more than
        the one licence."""
        for pattern, known in self.licenses.items():
            if fnmatchcase(stated.lower(), str(pattern).lower()):
                more = COPYLEFT.search(stated) or _MORE.search(stated)
                if stated.lower() == str(pattern).lower() or not more or not tier_of(str(known)).permissive:
                    return str(known)
        name = normalize_license(stated)
        return stated if name == NO_LICENSE else name


def load_recipe(path: Path | None, name: str) -> Recipe:
    """A recipe from a file, or the one that comes with SILO under that name or for that data set; else the plain one.

    Raises:
        UsageError: there is no such recipe, or it says what no recipe can.
    """
    own = sorted(RECIPES.glob("*.yaml"))
    if path is not None:
        named = [each for each in own if each.stem == str(path)]
        return load_config(Recipe, path if path.exists() or not named else named[0])
    for each in own:
        recipe = load_config(Recipe, each)
        if any(fnmatchcase(name.partition("#")[0], pattern) for pattern in recipe.datasets):
            return recipe
    return Recipe()


def hub_documents(name: str, recipe: Recipe, note: Note, *, called: str = "") -> Iterator[Document]:
    """All splits of a data set, as a stream. NAME is a data set of the hub or a local directory, with ``#CONFIG``.

    CALLED stands for NAME in the documents' ids, for a directory whose place must not decide their splits.

    Raises:
        DataError: it cannot be read, or a row is no document.
    """
    import datasets

    path, _, config = name.partition("#")
    try:
        splits = datasets.load_dataset(path, config or None, streaming=True)
        for split in sorted(splits):
            for number, row in enumerate(splits[split]):
                yield document_of_row(
                    row,
                    recipe,
                    name=f"hf:{called or name}",
                    default_id=f"{split}/{number}",
                    config=config or Path(path).name,
                )
    except (DataError, UsageError):
        raise
    except Exception as error:
        # The loader raises whatever its readers, the hub's client and the network raise.
        raise DataError(f"hf:{name} cannot be read: {error}; check the name, or give a local directory") from None


def document_of_row(
    row: Mapping[str, Any], recipe: Recipe, *, name: str, default_id: str, config: str = ""
) -> Document:
    """Make a document of a row. Raises :class:`DataError`."""
    found = {ours: _field(row, recipe, ours) for ours in OURS}
    own_id = default_id if found["id"] in (None, "") else found["id"]  # which may be the number 0
    body = {key: found[key] for key in ("text", "prompt", "completion") if found[key] is not None}
    record = {
        **body,
        "id": f"{name}/{own_id}",
        "license": recipe.license(found["license"], config),
        "owner": _joined(found["owner"]),
        "source": found["source"] or name,
        "title": found["title"],
    }
    return document_from_record(record, where=f"{name}, {default_id}")


def _field(row: Mapping[str, Any], recipe: Recipe, ours: str) -> Any:
    """A field by the recipe, else by its usual names, in the row itself or in the ``metadata`` of Dolma's rows."""
    if ours in recipe.fields:
        value: Any = row
        for part in str(recipe.fields[ours]).split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value
    metadata = row["metadata"] if isinstance(row.get("metadata"), Mapping) else {}
    for place in (row, metadata):
        for name in _USUAL.get(ours, (ours,)):
            if place.get(name) is not None:
                return place[name]
    return None


def _joined(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
