"""Configuration: YAML files -> one frozen `Config`.

Written shape (`written.py`, what people type) and running shape (`running.py`, what the code reads) are different
types. Loading reports every fault at once with its file and path; `ConfigSource` swaps one pointer.
"""

from app.config.price_table import CLASSES, PriceTable, read_price_table, usd, write_price_table
from app.config.reading import FILES, ConfigError, price_table, price_tables
from app.config.running import (
    CACHED,
    NAME,
    SERVICE_KEY,
    UNLIMITED,
    Account,
    Alias,
    AliasCache,
    AwsChain,
    Cascade,
    Config,
    Credential,
    Guardrail,
    Hedge,
    Hours,
    Issuer,
    Provider,
    Quota,
    Rule,
    Secret,
    ServiceAccount,
    ServiceKey,
    Settings,
    Shadow,
    Target,
    Tenant,
    TenantCache,
    Timeouts,
    VendorKey,
    When,
)
from app.config.source import ConfigSource, load, utc_day
from app.config.tariff import UNKNOWN, Price, Rate, Tariff, Window
from app.config.written import (
    PRIORITIES,
    Away,
    CacheMode,
    Doubt,
    Mode,
    Written,
    WrittenAway,
    WrittenBreaker,
    WrittenContent,
    WrittenDiscount,
    WrittenDrain,
    WrittenLongContext,
    WrittenOverload,
    WrittenPrice,
    WrittenRate,
    WrittenRedis,
    WrittenRetry,
    WrittenSpool,
    WrittenWindow,
)
