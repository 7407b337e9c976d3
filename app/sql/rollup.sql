-- name: lock
-- Keeps others from preparing the tables until this transaction ends.
SELECT pg_advisory_xact_lock(hashtextextended('gateway rollup', 0));

-- name: create_rollup
-- The ledger's sums by UTC day and by all that finance asks for; kept when retention drops the rows they came from.
CREATE TABLE IF NOT EXISTS rollup (
    day             date    NOT NULL,
    tenant_id       text,
    feature_id      text,
    model_alias     text,
    model_resolved  text,
    provider        text,
    environment     text    NOT NULL,
    requests        bigint  NOT NULL,
    success         bigint  NOT NULL,
    error           bigint  NOT NULL,
    refused         bigint  NOT NULL,
    rate_limited    bigint  NOT NULL,
    blocked         bigint  NOT NULL,
    client_closed   bigint  NOT NULL,
    interrupted     bigint  NOT NULL,
    timeout         bigint  NOT NULL,
    cache_hits      bigint  NOT NULL,
    fallbacks       bigint  NOT NULL,
    unpriced        bigint  NOT NULL,
    input_tokens    bigint  NOT NULL,
    output_tokens   bigint  NOT NULL,
    total_tokens    bigint  NOT NULL,
    cost_input_usd  numeric NOT NULL,
    cost_output_usd numeric NOT NULL,
    cost_usd        numeric NOT NULL,
    saved_usd       numeric NOT NULL,
    UNIQUE NULLS NOT DISTINCT (day, tenant_id, feature_id, model_alias, model_resolved, provider, environment)
);

-- name: create_tenant_index
-- A tenant's days.
CREATE INDEX IF NOT EXISTS rollup_tenant ON rollup (tenant_id, day);

-- name: create_rollup_day
-- Which days have been summed, over how many rows, and when the ledger was looked at for it.
CREATE TABLE IF NOT EXISTS rollup_day (
    day       date        PRIMARY KEY,
    ledger_rows bigint    NOT NULL,
    looked_at timestamptz NOT NULL
);

-- name: create_rollup_state
-- One line: what the ledger had recorded before `complete_at` is in the rollups.
CREATE TABLE IF NOT EXISTS rollup_state (
    only_line   boolean     PRIMARY KEY DEFAULT true CHECK (only_line),
    complete_at timestamptz NOT NULL
);

-- name: create_recorded_index
-- Finds the rows that are new since a moment; block ranges suffice, for rows are recorded in this very order.
CREATE INDEX IF NOT EXISTS ledger_recorded ON ledger USING brin (recorded_at) WITH (autosummarize = on);

-- name: due_days
-- The days with rows that their rollup has not seen, oldest first; `since` null looks at the whole ledger.
SELECT day
FROM (
    SELECT (occurred_at AT TIME ZONE 'UTC')::date AS day, max(recorded_at) AS newest
    FROM ledger
    WHERE recorded_at >= coalesce(%(since)s::timestamptz, '-infinity')
    GROUP BY 1
) AS touched
LEFT JOIN rollup_day USING (day)
-- A row's time is its transaction's beginning: it may have become visible up to a minute later.
WHERE looked_at IS NULL OR newest >= looked_at - interval '1 minute'
ORDER BY day;

-- name: clock
-- The database's time, with the minute that a row may take to become visible taken off.
SELECT now() - interval '1 minute';

-- name: complete_at
-- Until when the rollups are complete.
SELECT complete_at FROM rollup_state;

-- name: complete
-- Notes until when the rollups are complete.
INSERT INTO rollup_state (complete_at) VALUES (%(complete_at)s)
ON CONFLICT (only_line) DO UPDATE SET complete_at = greatest(rollup_state.complete_at, excluded.complete_at);

-- name: lock_day
-- One rollup of a day at a time.
SELECT pg_advisory_xact_lock(hashtextextended('gateway rollup ' || %(day)s::text, 0));

-- name: clear_day
-- Takes a day's rollup away, to be made anew.
DELETE FROM rollup WHERE day = %(day)s;

-- name: sum_day
-- Makes a day's rollup from the ledger.
INSERT INTO rollup
SELECT
    %(day)s::date, tenant_id, feature_id, model_alias, model_resolved, provider, environment,
    -- Adjustments are no calls: they have costs and nothing else.
    count(*) FILTER (WHERE adjusts IS NULL),
    count(*) FILTER (WHERE status = 'success' AND adjusts IS NULL),
    count(*) FILTER (WHERE status = 'error' AND adjusts IS NULL),
    count(*) FILTER (WHERE status = 'refused' AND adjusts IS NULL),
    count(*) FILTER (WHERE status = 'rate_limited' AND adjusts IS NULL),
    count(*) FILTER (WHERE status = 'blocked' AND adjusts IS NULL),
    count(*) FILTER (WHERE status = 'client_closed' AND adjusts IS NULL),
    count(*) FILTER (WHERE status = 'interrupted' AND adjusts IS NULL),
    count(*) FILTER (WHERE status = 'timeout' AND adjusts IS NULL),
    count(*) FILTER (WHERE cache_hit AND adjusts IS NULL),
    count(*) FILTER (WHERE fallback_used AND adjusts IS NULL),
    count(*) FILTER (WHERE cost_status = 'unpriced') - count(*) FILTER (WHERE cost_status = 'repriced'),
    sum(input_tokens), sum(output_tokens), sum(total_tokens),
    sum(cost_input_usd), sum(cost_output_usd), sum(cost_usd), sum(saved_usd)
FROM ledger
WHERE occurred_at >= %(day)s::date::timestamp AT TIME ZONE 'UTC'
  AND occurred_at < (%(day)s::date::timestamp + interval '1 day') AT TIME ZONE 'UTC'
GROUP BY tenant_id, feature_id, model_alias, model_resolved, provider, environment;

-- name: note_day
-- Notes a day's rollup; `before` is how many rows the one before it was made from, null when there was none.
WITH summed AS (
    SELECT coalesce(sum(requests), 0)::bigint AS ledger_rows, count(*) AS lines FROM rollup WHERE day = %(day)s
), before AS (
    SELECT ledger_rows FROM rollup_day WHERE day = %(day)s
), noted AS (
    INSERT INTO rollup_day SELECT %(day)s, ledger_rows, now() FROM summed
    ON CONFLICT (day) DO UPDATE SET ledger_rows = excluded.ledger_rows, looked_at = excluded.looked_at
)
SELECT summed.ledger_rows, summed.lines, (SELECT ledger_rows FROM before) AS before FROM summed;

-- name: daily
-- A day by tenant and feature: tokens, dollars, requests.
SELECT tenant_id, coalesce(feature_id, 'unknown'), sum(total_tokens)::bigint, sum(cost_usd), sum(requests)::bigint
FROM rollup
WHERE day = %(day)s AND tenant_id IS NOT NULL
GROUP BY tenant_id, coalesce(feature_id, 'unknown')
ORDER BY tenant_id, coalesce(feature_id, 'unknown');
