"""Configuration: YAML files -> one frozen `Config`.

Written shape (`written.py`, what people type) and running shape (`running.py`, what the code reads) are different
types. Loading reports every fault at once with its file and path; `ConfigSource` swaps one pointer.
"""

from app.config.reading import FILES, ConfigError
from app.config.running import (
    NAME,
    SERVICE_KEY,
    Alias,
    Config,
    Credential,
    Price,
    Provider,
    Secret,
    ServiceKey,
    Settings,
    Target,
    Tenant,
    Timeouts,
)
from app.config.source import ConfigSource, load
from app.config.written import Written, WrittenDrain, WrittenRedis, WrittenRetry, WrittenSpool

__all__ = [
    "FILES", "NAME", "SERVICE_KEY", "Alias", "Config", "ConfigError", "ConfigSource", "Credential", "Price", "Provider",
    "Secret", "ServiceKey", "Settings", "Target", "Tenant", "Timeouts", "Written", "WrittenDrain", "WrittenRedis",
    "WrittenRetry", "WrittenSpool", "load",
]  # fmt: skip
