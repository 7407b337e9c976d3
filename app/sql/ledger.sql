-- name: settings
-- Bounds every statement of this connection on the server's side too.
SELECT set_config('statement_timeout', %(statement_ms)s::text, false),
       set_config('lock_timeout', %(lock_ms)s::text, false),
       set_config('TimeZone', 'UTC', false);

-- name: exists
-- Whether the ledger's table is there as it is today, so that a role that may not create tables can still ship.
SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('ledger') AND attname = 'adjusts');

-- name: lock
-- Keeps other shippers from preparing the schema until this transaction ends.
SELECT pg_advisory_xact_lock(hashtextextended('gateway ledger', 0));

-- name: create_ledger
-- The ledger: insert-only, one row a call, a partition a month, and the whole event beside the columns that are asked for.
CREATE TABLE IF NOT EXISTS ledger (
    occurred_at         timestamptz    NOT NULL,
    event_id            uuid           NOT NULL,
    request_id          text           NOT NULL,
    trace_id            text           NOT NULL,
    tenant_id           text,
    feature_id          text,
    key_id              text           NOT NULL,
    purpose             text           NOT NULL,
    environment         text           NOT NULL,
    model_alias         text,
    model_resolved      text,
    provider            text,
    vendor_request_id   text,
    status              text           NOT NULL,
    error_code          text,
    cache_hit           boolean        NOT NULL,
    fallback_used       boolean        NOT NULL,
    input_tokens        bigint         NOT NULL,
    output_tokens       bigint         NOT NULL,
    total_tokens        bigint         NOT NULL,
    cost_input_usd      numeric(20, 9) NOT NULL,
    cost_output_usd     numeric(20, 9) NOT NULL,
    cost_usd            numeric(20, 9) NOT NULL,
    saved_usd           numeric(20, 9) NOT NULL,
    cost_status         text           NOT NULL,
    usage_source        text           NOT NULL,
    price_table_version text           NOT NULL,
    config_version      text           NOT NULL,
    adjusts             uuid,
    event               jsonb          NOT NULL,
    recorded_at         timestamptz    NOT NULL DEFAULT now(),
    PRIMARY KEY (occurred_at, event_id)
) PARTITION BY RANGE (occurred_at);

-- name: add_adjusts
-- The column that an older ledger lacks: which call a row corrects.
ALTER TABLE ledger ADD COLUMN IF NOT EXISTS adjusts uuid;

-- name: create_tenant_index
-- A tenant's rows of a time span, with what is summed of them: its rows lie scattered over all pages of a month, and
-- reading those cold takes longer than everything else. No text here is longer than 128 characters, far below the limit.
CREATE INDEX IF NOT EXISTS ledger_tenant ON ledger (tenant_id, occurred_at) INCLUDE (
    feature_id, model_alias, model_resolved, provider, environment, status, cost_status, cache_hit, fallback_used, adjusts,
    input_tokens, output_tokens, total_tokens, cost_usd, saved_usd
);

-- name: create_default_partition
-- Rows of months that have no partition: stragglers from a disk that was away, or a clock that was wrong.
CREATE TABLE IF NOT EXISTS ledger_default PARTITION OF ledger DEFAULT;

-- name: create_partition_function
-- Makes the partition of a month unless it exists, with the rows of that month that the default one holds; true when made.
CREATE OR REPLACE FUNCTION ledger_make_partition(month date) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    partition text := 'ledger_' || to_char(month, 'YYYY_MM');
    starts    timestamptz := date_trunc('month', month::timestamp) AT TIME ZONE 'UTC';
    ends      timestamptz := (date_trunc('month', month::timestamp) + interval '1 month') AT TIME ZONE 'UTC';
BEGIN
    IF to_regclass(partition) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE ledger INCLUDING DEFAULTS)', partition);
    -- No straggler may arrive in the default partition between the move and the attachment, which needs this lock.
    LOCK TABLE ledger_default IN ACCESS EXCLUSIVE MODE;
    EXECUTE format(
        'WITH moved AS (DELETE FROM ledger_default WHERE occurred_at >= %L AND occurred_at < %L RETURNING *)'
        ' INSERT INTO %I SELECT * FROM moved', starts, ends, partition);
    EXECUTE format('ALTER TABLE ledger ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', partition, starts, ends);
    RETURN true;
END
$$;

-- name: make_partitions
-- The partitions of this month and the next two; counts those that were made.
SELECT count(*) FILTER (WHERE ledger_make_partition(month::date))
FROM generate_series(
    date_trunc('month', %(today)s::date::timestamp),
    date_trunc('month', %(today)s::date::timestamp) + interval '2 months',
    interval '1 month'
) AS month;

-- name: make_straggler_partitions
-- The partitions of months whose rows the default one holds, which moves them; counts those that were made. Months of
-- clocks that are wrong get none.
SELECT count(*) FILTER (WHERE ledger_make_partition(month))
FROM (
    SELECT DISTINCT date_trunc('month', occurred_at AT TIME ZONE 'UTC')::date AS month
    FROM ledger_default
    WHERE occurred_at >= (%(today)s::date::timestamp - interval '10 years') AT TIME ZONE 'UTC'
      AND occurred_at < (date_trunc('month', %(today)s::date::timestamp) + interval '3 months') AT TIME ZONE 'UTC'
) AS months;

-- name: create_retention_function
-- Drops the partitions of months before one, and such rows of the default partition; returns the partitions' names.
CREATE OR REPLACE FUNCTION ledger_drop_before(month date) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    partition text;
BEGIN
    FOR partition IN
        SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
        WHERE inhparent = 'ledger'::regclass AND relname ~ '^ledger_\d{4}_\d{2}$'
          AND to_date(right(relname, 7), 'YYYY_MM') < date_trunc('month', month::timestamp)
        ORDER BY relname
    LOOP
        EXECUTE format('DROP TABLE %I', partition);
        RETURN NEXT partition;
    END LOOP;
    DELETE FROM ledger_default WHERE occurred_at < date_trunc('month', month::timestamp) AT TIME ZONE 'UTC';
END
$$;

-- name: drop_before
-- Drops what is older than so many whole months before this one.
SELECT ledger_drop_before((date_trunc('month', %(today)s::date::timestamp) - make_interval(months => %(months)s))::date);

-- name: default_rows
-- How many rows are in no month's partition.
SELECT count(*) FROM ledger_default;

-- name: insert_events
-- Takes a JSON array of events into the ledger; an event that is there already, by time and id, changes nothing.
INSERT INTO ledger (
    occurred_at, event_id, request_id, trace_id, tenant_id, feature_id, key_id, purpose, environment,
    model_alias, model_resolved, provider, vendor_request_id, status, error_code, cache_hit, fallback_used,
    input_tokens, output_tokens, total_tokens, cost_input_usd, cost_output_usd, cost_usd, saved_usd,
    cost_status, usage_source, price_table_version, config_version, adjusts, event
)
SELECT
    (event ->> 'timestamp')::timestamptz,
    (event ->> 'event_id')::uuid,
    event ->> 'request_id',
    event ->> 'trace_id',
    event ->> 'tenant_id',
    event ->> 'feature_id',
    event ->> 'key_id',
    event ->> 'purpose',
    event ->> 'environment',
    event ->> 'model_alias',
    event ->> 'model_resolved',
    event ->> 'provider',
    event ->> 'vendor_request_id',
    event ->> 'status',
    event ->> 'error_code',
    (event ->> 'cache_hit')::boolean,
    (event ->> 'fallback_used')::boolean,
    (event -> 'usage' ->> 'input_tokens')::bigint,
    (event -> 'usage' ->> 'output_tokens')::bigint,
    (event -> 'usage' ->> 'total_tokens')::bigint,
    (event -> 'cost_usd' ->> 'input')::numeric,
    (event -> 'cost_usd' ->> 'output')::numeric,
    (event -> 'cost_usd' ->> 'total')::numeric,
    (event ->> 'saved_usd')::numeric,
    event ->> 'cost_status',
    event ->> 'usage_source',
    event -> 'cost_usd' ->> 'price_table_version',
    event ->> 'config_version',
    (event ->> 'adjusts')::uuid,
    event
FROM jsonb_array_elements(%(events)s::jsonb) AS events (event)
ON CONFLICT (occurred_at, event_id) DO NOTHING;
