"""Checks rendered manifests, and the chart's values file, in ways that helm doesn't.

validate.py manifests VERSION FILE   every manifest against Kubernetes' own schemas, unknown fields refused
validate.py values CHART             values.yaml and values.schema.json name the same values, each one commented

Each check is a line, `ok …` or `not ok …`; what has no schema is a line `skip …`.
"""

import json
import pathlib
import re
import sys

import kubernetes_validate
import yaml

# Kinds of custom resources: their schemas belong to the operators that define them.
CUSTOM_KINDS = {"ServiceMonitor"}


def check_manifests(version: str, path: pathlib.Path) -> None:
    manifests = [manifest for manifest in yaml.safe_load_all(path.read_text()) if manifest]
    for manifest in manifests:
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

    # What the API server or a running cluster would find and no schema can say.
    too_much = [problem for manifest in manifests for problem in find_excessive_requests(manifest)]
    report(not too_much, f"{path.stem}: no request is above its limit", ", ".join(too_much))
    astray = list(find_stray_selectors(manifests))
    report(not astray, f"{path.stem}: every selector finds the server's pods and no others", ", ".join(astray))


def find_excessive_requests(manifest: dict):
    pod = manifest.get("spec", {}).get("template", manifest).get("spec", {})
    for container in pod.get("containers", []):
        resources = container.get("resources", {})
        limits = resources.get("limits", {})
        for name, request in resources.get("requests", {}).items():
            if name in limits and parse_quantity(request) > parse_quantity(limits[name]):
                yield f"{container['name']} asks for {name} {request} and may have {limits[name]}"


def parse_quantity(quantity: str | int | float) -> float:
    number, suffix = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(quantity)).groups()
    scales = {"": 1, "m": 1e-3, "k": 1e3}
    for power, letter in enumerate("KMGTPE", start=1):
        scales[letter] = 1000**power
        scales[f"{letter}i"] = 1024**power
    return float(number) * scales[suffix]


def find_stray_selectors(manifests: list[dict]):
    server = next((m for m in manifests if m["kind"] == "Deployment"), None)
    if server is None:
        return
    pods = {
        "the server's": server["spec"]["template"]["metadata"]["labels"],
        "the test's": next((m["metadata"]["labels"] for m in manifests if m["kind"] == "Pod"), {}),
    }
    for manifest in manifests:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Service":
                selector = spec["selector"]
            case "Deployment" | "PodDisruptionBudget":
                selector = spec["selector"]["matchLabels"]
            case "NetworkPolicy":
                selector = spec["podSelector"]["matchLabels"]
            case _:
                continue
        found = [owner for owner, labels in pods.items() if selector.items() <= labels.items()]
        if found != ["the server's"]:
            yield f"{manifest['kind']} {manifest['metadata']['name']} finds {' and '.join(found) or 'no'} pods"


def check_values(chart: pathlib.Path) -> None:
    text = (chart / "values.yaml").read_text()
    schema = json.loads((chart / "values.schema.json").read_text())

    uncommented = list(find_uncommented(yaml.compose(text), text.splitlines(), ""))
    report(not uncommented, "every value has a comment", ", ".join(uncommented))

    differences = list(compare(yaml.safe_load(text), schema, ""))
    report(not differences, "values.yaml and values.schema.json name the same values", "; ".join(differences))


def find_uncommented(group: yaml.MappingNode, lines: list[str], path: str):
    """Names the values with no comment on the line above. A group needs none: each value in it has one."""
    for key, value in group.value:
        name = f"{path}{key.value}"
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from find_uncommented(value, lines, f"{name}.")
        elif not lines[key.start_mark.line - 1].lstrip().startswith("#"):
            yield name


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
