"""The shape of `app/`: layers, homes of third-party packages, the error tree as it is drawn; and the lock files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import errors
from app.errors import GatewayError
from app.providers import PROVIDERS
from app.release import VERSION

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("errors", "ambient", "heap", "release", "audit", "redaction", "sse", "sql", "prompt_size"),
    ("wire", "vendors", "config", "core"),
    ("providers", "dialects"),
    (
        "auth", "cache", "control", "cooldowns", "limits", "redis_pipe", "redis_cluster", "ledger", "credentials",
        "upstream", "upstream_httpx", "http1", "telemetry", "warnings", "content", "paces", "allowance", "modes",
        "overload", "guardrails", "children", "shipping",
    ),
    (
        "routing", "estimate", "settlement", "relay", "confidence", "recall", "answer_headers", "dialogue", "shadows",
        "gateway", "errands", "server", "visits",
    ),
    (
        "api", "openapi", "admin", "cache_door", "status_page", "bodies", "keys", "ledger_shipper", "archive",
        "reports", "price_sync", "rerate", "usage_pages", "ledger_schema", "ledger_segment", "dead_letters", "lake",
        "content_writer",
    ),
    (
        "asgi", "vitals", "cli", "cache_commands", "operator", "lint_apps", "jobs", "explain",
        "ledger_commands", "mode_commands", "content_commands", "top", "top_screen", "money_commands", "price_commands",
        "terminal",
    ),
)  # fmt: skip
"""The rooms from the ground up: a file imports only from layers before its own."""

WITHIN_A_LAYER = {
    ("config", "vendors"): "what a kind of provider needs",
    ("dialects", "providers"): "a dialect wraps a vendor's translator",
    ("core", "wire"): "a call carries its request",
    ("config", "wire"): "what a target can serve",
    ("core", "config"): "a call carries the snapshot it is served under",
    ("limits", "redis_pipe"): "the pipe is the lower half of the limits",
    ("redis_cluster", "redis_pipe"): "a cluster is a pipe to each node",
    ("limits", "redis_cluster"): "what one script may take from is in one slot",
    ("control", "redis_cluster"): "the command line tells a cluster too",
    ("cooldowns", "control"): "what rests is told to the other replicas",
    ("cooldowns", "redis_pipe"): "or it is not, while Redis is away",
    ("control", "redis_pipe"): "the channel is a hash in Redis",
    ("modes", "control"): "modes are told there",
    ("warnings", "redis_pipe"): "who warns is decided in Redis",
    ("warnings", "limits"): "a warning is of a limit",
    ("upstream", "http1"): "the default engine of the upstream",
    ("upstream", "upstream_httpx"): "the engine where a proxy is set",
    ("confidence", "relay"): "a finish reason has one name",
    ("dialogue", "confidence"): "what is to be doubted",
    ("dialogue", "routing"): "what to try next",
    ("dialogue", "relay"): "a good answer may be a stream",
    ("dialogue", "settlement"): "an intent before each attempt",
    ("gateway", "dialogue"): "the journey's way to vendors",
    ("gateway", "relay"): "and back",
    ("gateway", "recall"): "or to an answer from before",
    ("gateway", "cache"): "which may be on its way",
    ("gateway", "answer_headers"): "what its answers say of themselves",
    ("answer_headers", "recall"): "where an answer came from",
    ("answer_headers", "settlement"): "whether another target answers than the first",
    ("recall", "routing"): "what a failure that is shared comes to",
    ("cache", "redis_pipe"): "answers are kept in Redis",
    ("cache", "control"): "what was invalidated is told to all replicas",
    ("gateway", "settlement"): "one event at the end",
    ("gateway", "routing"): "what a failure in mid-stream comes to",
    ("gateway", "shadows"): "a copy is sent when its call is over",
    ("gateway", "estimate"): "the journey asks what a call may need",
    ("server", "visits"): "a port's connections",
    ("api", "bodies"): "the front door takes bodies in",
    ("api", "openapi"): "the front door says what it is",
    ("admin", "api"): "both doors answer errors alike",
    ("cache_door", "admin"): "who is an administrator",
    ("status_page", "admin"): "who is an administrator",
    ("status_page", "reports"): "HTML is written alike",
    ("ledger_shipper", "archive"): "the archive is the shipper's far end",
    ("ledger_shipper", "ledger_segment"): "what it ships from",
    ("ledger_segment", "dead_letters"): "what cannot be a row is kept",
    ("dead_letters", "archive"): "what can be a row after all is one",
    ("ledger_shipper", "lake"): "what PostgreSQL has goes on to the lake",
    ("lake", "archive"): "a day's files can be made from the ledger",
    ("lake", "reports"): "its files are tables like those of exports",
    ("reports", "archive"): "reports read what the shipper wrote",
    ("usage_pages", "archive"): "pages say when there is nothing to read from",
    ("usage_pages", "reports"): "pages show what reports found",
    ("rerate", "archive"): "adjustments are rows of the ledger",
    ("asgi", "vitals"): "a replica's figures",
    ("vitals", "asgi"): "whose they are",
    ("cli", "asgi"): "`gateway serve`",
    ("cli", "explain"): "`gateway check --explain`",
    ("cli", "content_commands"): "`gateway content`",
    ("content_commands", "operator"): "who deleted what",
    ("cli", "top"): "`gateway top`",
    ("top", "top_screen"): "what it found is shown",
    ("top_screen", "top"): "what it shows",
    ("cli", "lint_apps"): "`gateway lint-apps`",
    ("cli", "cache_commands"): "`gateway cache`",
    ("cache_commands", "operator"): "who did what",
    ("cli", "mode_commands"): "`gateway mode`",
    ("cli", "operator"): "who did it",
    ("mode_commands", "operator"): "who did it",
    ("cli", "money_commands"): "`gateway rollup`, `gateway export`",
    ("money_commands", "jobs"): "`gateway jobs`",
    ("cli", "price_commands"): "`gateway prices`",
    ("cli", "ledger_commands"): "`gateway ledger`, `gateway spool`",
    ("cli", "terminal"): "what commands share",
    ("cache_commands", "terminal"): "what commands share",
    ("content_commands", "terminal"): "what commands share",
    ("ledger_commands", "terminal"): "what commands share",
    ("mode_commands", "terminal"): "what commands share",
    ("money_commands", "terminal"): "what commands share",
    ("price_commands", "terminal"): "what commands share",
    ("top", "terminal"): "what commands share",
    ("shipping", "children"): "how a child is ended",
    ("content", "children"): "how a child is ended",
}

HOMES = {
    "jwt": {"auth", "credentials"},
    "phonenumbers": {"redaction"},
    "rich": {"top_screen"},
    "botocore": {"credentials", "providers"},
    "yaml": {"config"},
    "redis": {"redis_pipe", "redis_cluster"},
    "hiredis": {"redis_pipe"},
    "httpx": {"upstream_httpx", "auth", "credentials", "warnings", "guardrails", "top", "asgi"},
    "certifi": {"upstream"},
    "httptools": {"http1", "server", "visits"},
    "opentelemetry": {"telemetry"},
    "numpy": {"cache"},
    "onnxruntime": {"cache"},
    "prometheus_client": {"telemetry", "top"},
    "psycopg": {"archive"},
    "pyarrow": {"reports", "lake"},
    "genai_prices": {"price_sync"},
    "litestar": {"api", "admin", "cache_door", "bodies", "server", "visits", "usage_pages", "status_page"},
    "uvloop": {"asgi"},
    "tokenizers": {"cache"},
    "time": {"ambient"},
    "random": {"ambient"},
    "uuid": {"ambient"},
    "secrets": {"ambient"},
}
"""Where a package may be imported; every third-party package but msgspec stands here."""

PURE_PARTS = {
    "botocore.auth": "computes signatures",
    "botocore.awsrequest": "what they are over",
    "botocore.credentials": "what they are made with",
    "botocore.eventstream": "decodes bytes",
    "urllib.parse": "quotes paths",
}
"""Modules without input or output in packages that have both, which translators may use."""

READS_ENVIRONMENT = {
    "asgi": "composition root",
    "cli": "command line",
    "operator": "command line",
    "terminal": "command line",
    "top": "command line",
    "money_commands": "command line",
    "ledger_commands": "command line",
    "ledger_shipper": "composition root of its own process",
    "config/source": "the default of `load`",
    "telemetry/traces": "OpenTelemetry's own variables",
    "upstream": "the proxy variables that every HTTP client honours",
}

ALL = {
    path.relative_to(ROOT / "app").with_suffix("").as_posix().removesuffix("/__init__"): ast.parse(path.read_text())
    for path in sorted((ROOT / "app").rglob("*.py"))
    if path != ROOT / "app" / "__init__.py"
}
"""Every module of the product by its path inside `app`: `gateway`, `providers/openai`."""


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what a module imports, deferred imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "app":
                yield from (f"app.{name.name}" for name in node.names)
            else:
                yield node.module or ""


def room(module: str) -> str:
    return module.partition("/")[0]


def layer(name: str) -> int:
    return next(place for place, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("module", ALL)
def test_every_module_has_a_layer(module: str) -> None:
    assert any(room(module) in names for names in LAYERS)


@pytest.mark.parametrize("module", ALL)
def test_a_module_imports_only_from_the_layers_above_it(module: str) -> None:
    own = room(module)
    wrong = [
        name
        for name in imports(ALL[module])
        if name.startswith("app.")
        and (other := name.split(".")[1]) != own
        and layer(other) >= layer(own)
        and (own, other) not in WITHIN_A_LAYER
    ]
    assert wrong == []


def test_every_exception_to_the_layer_rule_is_in_use() -> None:
    used = {(room(module), name.split(".")[1]) for module in ALL for name in imports(ALL[module]) if "app." in name}
    assert set(WITHIN_A_LAYER) <= used


@pytest.mark.parametrize("module", ALL)
def test_a_package_is_imported_only_at_its_home(module: str) -> None:
    wrong = [
        name
        for name in imports(ALL[module])
        if (package := name.partition(".")[0]) in HOMES and room(module) not in HOMES[package]
    ]
    assert wrong == []


def test_every_third_party_package_has_a_home() -> None:
    packages = {name.partition(".")[0] for tree in ALL.values() for name in imports(tree)}
    assert packages - set(sys.stdlib_module_names) - set(HOMES) == {"app", "msgspec", "loadtest"}


@pytest.mark.parametrize("module", [name for name in ALL if room(name) in ("providers", "dialects", "sse")])
def test_pure_modules_import_msgspec_and_no_input_or_output(module: str) -> None:
    pure = {
        "app",
        "msgspec",
        "base64",
        "collections",
        "contextlib",
        "datetime",
        "email",
        "enum",
        "functools",
        "hmac",
        "re",
        "struct",
        "types",
        "typing",
        "__future__",
    }
    names = {name if name in PURE_PARTS else name.partition(".")[0] for name in imports(ALL[module])}
    assert names <= pure | PURE_PARTS.keys()


def test_the_product_imports_the_local_stack_only_in_the_command_line() -> None:
    assert [module for module, tree in ALL.items() if any(n.startswith("loadtest") for n in imports(tree))] == ["cli"]


def test_the_command_line_imports_the_local_stack_only_where_it_is_used() -> None:
    top = [node for node in ALL["cli"].body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any(name.startswith("loadtest") for name in imports(ast.Module(top, [])))


@pytest.mark.parametrize("module", ALL)
def test_the_environment_is_read_only_where_it_is_said(module: str) -> None:
    reads = any(
        isinstance(node, ast.Attribute)
        and node.attr in ("environ", "environb", "getenv")
        and _is_name(node.value, "os")
        for node in ast.walk(ALL[module])
    )
    assert reads == (module in READS_ENVIRONMENT)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


@pytest.mark.parametrize(
    ("process", "heavy"),
    [
        (
            # What only some configurations, or other commands, ask for. httpx brings rich, pygments and click with it.
            "app.cli, app.asgi; app.api.Routes([])",
            "httpx rich pygments click jwt cryptography.hazmat botocore pyarrow numpy onnxruntime tokenizers requests "
            "opentelemetry.exporter genai_prices phonenumbers pydantic attr app.lake app.upstream_httpx",
        ),
        (
            "app.ledger_shipper",
            "httpx httptools rich click litestar opentelemetry prometheus_client redis hiredis uvloop jwt pyarrow "
            "app.gateway app.dialects app.telemetry",
        ),
    ],
    ids=["serve", "shipper"],
)
def test_a_process_does_without_packages_that_it_may_never_need(process: str, heavy: str) -> None:
    code = f"import sys, {process}; print(*sorted(set({heavy.split()}) & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert ran.stdout.decode().strip() == ""


def test_the_code_runs_where_it_is_no_installed_distribution(tmp_path: Path) -> None:
    """As in the image, which has a copy of `app/` beside the packages of the lock."""
    packages = tmp_path / "packages"
    for folder in (packages, tmp_path / "gateway"):
        folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("llm_gateway", "__editable__")):
            (packages / path.name).symlink_to(path)
    (tmp_path / "gateway" / "app").symlink_to(ROOT / "app")
    code = "import sys, app.asgi, app.openapi, app.cli; app.openapi.document(); app.cli.main(['--version'])"
    environ = {"PYTHONPATH": f"{tmp_path / 'gateway'}:{packages}", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-S", "-c", code]  # -S: without the environment's own packages
    ran = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert ran.stdout == f"gateway {VERSION}\n", ran.stderr


def test_the_release_is_the_one_that_is_built() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


@pytest.mark.parametrize("guarded", ["aliases", "tenants", "plans"])
def test_httpx_is_loaded_with_a_configuration_that_names_somebody_to_ask(guarded: str) -> None:
    code = """if True:
        import sys
        from types import SimpleNamespace as Of
        from app.asgi import load_what_it_asks_for
        config = Of(targets={}, aliases={}, tenants={}, plans={}, issuers={}, settings=Of(warnings_webhook=None))
        load_what_it_asks_for(config)
        before = "httpx" in sys.modules
        getattr(config, sys.argv[1])["some"] = Of(guardrails=("pii",))
        load_what_it_asks_for(config)
        print(before, "httpx" in sys.modules)
    """
    ran = subprocess.run([sys.executable, "-c", code, guarded], cwd=ROOT, capture_output=True, check=True)
    assert ran.stdout.decode().split() == ["False", "True"]


@pytest.mark.parametrize("module", [module for module in ALL if room(module) != "providers"])
def test_no_branch_on_a_vendor_outside_the_providers(module: str) -> None:
    names = set(PROVIDERS) | {"openrouter", "azure", "anthropic", "bedrock", "gemini"}
    compared = [
        constant.value
        for node in ast.walk(ALL[module])
        if isinstance(node, (ast.Compare, ast.MatchValue))
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant) and constant.value in names
    ]
    assert compared == []


@pytest.mark.parametrize("module", ALL)
def test_importing_a_module_starts_nothing(module: str) -> None:
    """No statement at the top that is a bare call, except registrations on a class of this module."""
    calls = [ast.unparse(node) for node in ALL[module].body if isinstance(node, ast.Expr) and _calls(node.value)]
    assert [call for call in calls if not call.startswith("Loader.add_constructor")] == []


def _calls(node: ast.AST) -> bool:
    return isinstance(node, (ast.Call, ast.Await))


# --- the error tree -------------------------------------------------------------------------------------------------


def _classes(root: type[GatewayError] = GatewayError) -> Iterator[type[GatewayError]]:
    yield root
    for sub in root.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield from _classes(sub)


def _drawn() -> Iterator[tuple[str, str | None, str]]:
    """(class, parent, words beside it) for every line of the tree in the docstring of `errors`."""
    path: list[str] = []
    for line in (errors.__doc__ or "").partition("\n\n")[2].splitlines():
        match = re.fullmatch(r"((?:│   |    )*(?:├── |└── )?)(\w+) *(.*)", line)
        if match:
            depth = len(match[1]) // 4
            path = [*path[:depth], match[2]]
            yield match[2], path[depth - 1] if depth else None, match[3]


def test_the_drawn_error_tree_is_the_classes() -> None:
    drawn = [(name, parent) for name, parent, _ in _drawn()]
    assert drawn == [(c.__name__, None if c is GatewayError else c.__bases__[0].__name__) for c in _classes()]


@pytest.mark.parametrize(
    ("name", "said"), [(name, words) for name, _, words in _drawn() if re.match(r"\d{3} \w+$", words)]
)
def test_the_drawn_status_and_code_are_the_class_s_own(name: str, said: str) -> None:
    error = getattr(errors, name)
    assert said == f"{error.status} {error.code}"


def test_every_error_that_a_client_meets_is_drawn_with_status_and_code() -> None:
    bare = [name for name, _, words in _drawn() if not re.match(r"\d{3} \w+$", words)]
    leaves = {c.__name__ for c in _classes() if not c.__subclasses__() and not issubclass(c, errors.VendorError)}
    assert leaves.isdisjoint(bare)


@pytest.mark.parametrize("error", list(_classes()), ids=lambda error: error.__name__)
def test_every_error_says_what_to_do_about_it(error: type[GatewayError]) -> None:
    assert error.__dict__.get("__doc__")


def test_all_errors_of_the_product_stand_in_the_tree() -> None:
    elsewhere = [
        (module, node.name)
        for module, tree in ALL.items()
        if module != "errors"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and hasattr(errors, base.id) for base in node.bases)
    ]
    assert elsewhere == []


# --- what is installed, and what the files say -------------------------------------------------------------------


def test_at_most_fifteen_packages_are_needed_to_serve() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["dependencies"]) <= 15


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock", "requirements-frameworks.lock"])
def test_lock_files_name_no_host(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "--index-url" not in text


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock", "requirements-frameworks.lock"])
def test_every_locked_package_has_a_hash(name: str) -> None:
    packages = re.findall(r"(?m)^\S+==.*(?:\n .*)*", (ROOT / name).read_text())
    assert packages
    assert [package for package in packages if "--hash=sha256:" not in package] == []


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    machine = re.compile(rb"(?<![\w.~-])/(?:work|root|home)/\w")
    found = [
        f"{name}: {line!r}"
        for name in listed.stdout.decode().split("\0")
        if name and (ROOT / name).is_file()
        for line in (ROOT / name).read_bytes().splitlines()
        if machine.search(line)
    ]
    assert found == []


def test_every_folder_is_packaged() -> None:
    """One with data alone too, or every first `make up` prints a page of a build tool's warnings."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for name in ("app", "loadtest")
        for file in (ROOT / name).rglob("*")
        if file.is_file() and file.parent.name != "__pycache__"
    }
    assert set(packages) == folders
