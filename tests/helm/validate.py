"""Checks rendered manifests, and the chart's values file, in ways that helm doesn't.

validate.py manifests VERSION FILE   every manifest against Kubernetes' own schemas, unknown fields refused
validate.py values CHART             values.yaml and values.schema.json name the same values, each one commented

Each check is a line, `ok …` or `not ok …`; what has no schema is a line `skip …`.
"""

import json
import pathlib
import sys

import kubernetes_validate
import yaml

# Kinds of custom resources: their schemas belong to the operators that define them.
CUSTOM_KINDS = {"ServiceMonitor"}


def check_manifests(version: str, path: pathlib.Path) -> None:
    for manifest in filter(None, yaml.safe_load_all(path.read_text())):
        name = f"{path.stem}: {manifest['kind']} {manifest['metadata']['name']}"
        if manifest["kind"] in CUSTOM_KINDS:
            print(f"skip {name} (a custom resource)")
            continue
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            where = "/".join(map(str, error.path))
            print(f"not ok {name} is valid in Kubernetes {version}: {where}: {error.message}")
        else:
            print(f"ok {name} is valid in Kubernetes {version}")


def check_values(chart: pathlib.Path) -> None:
    text = (chart / "values.yaml").read_text()
    schema = json.loads((chart / "values.schema.json").read_text())

    uncommented = []
    lines = text.splitlines()
    for before, line in zip(lines, lines[1:]):
        is_key = line.split(":")[0].strip().isidentifier() and ":" in line
        if is_key and not before.strip().startswith("#") and "- " not in before and not opens_list_item(lines, line):
            uncommented.append(line.strip())
    report(not uncommented, "every value has a comment", ", ".join(uncommented))

    differences = list(compare(yaml.safe_load(text), schema, ""))
    report(not differences, "values.yaml and values.schema.json name the same values", "; ".join(differences))


def opens_list_item(lines: list[str], line: str) -> bool:
    """Whether `line` is inside an item of a list, whose keys are Kubernetes' and not the chart's."""
    indent = len(line) - len(line.lstrip())
    for earlier in reversed(lines[: lines.index(line)]):
        earlier_indent = len(earlier) - len(earlier.lstrip())
        if earlier.lstrip().startswith("- "):
            return earlier_indent + 2 == indent
        if earlier_indent < indent:
            return False
    return False


def compare(values: dict, schema: dict, path: str):
    """Names, at every level that the schema closes, what only one of the two has."""
    if "$ref" in schema or "properties" not in schema or not values:
        return
    known = set(schema["properties"]) - ({"global"} if not path else set())
    for name in sorted(set(values) ^ known):
        if path == "resources." and name == "claims":
            continue
        yield f"{path}{name} is only in {'values.yaml' if name in values else 'the schema'}"
    for name in set(values) & known:
        if isinstance(values[name], dict):
            yield from compare(values[name], schema["properties"][name], f"{path}{name}.")


def report(passed: bool, what: str, why_not: str) -> None:
    print(f"ok {what}" if passed else f"not ok {what}: {why_not}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["manifests", version, path]:
            check_manifests(version, pathlib.Path(path))
        case ["values", chart]:
            check_values(pathlib.Path(chart))
        case _:
            sys.exit(__doc__)
