-- name: has_rollups
-- Whether rollups were ever made here.
SELECT to_regclass('rollup_state') IS NOT NULL;

-- name: complete_until
-- The first day that the rollups do not hold whole.
SELECT (complete_at AT TIME ZONE 'UTC')::date FROM rollup_state;

-- name: rollup_sums
-- Sums of the rollups: in all, by day, by feature, by alias with model and provider, by tenant.
SELECT
    grouping(tenant_id, day, feature_id, provider)::int,
    day, tenant_id, feature_id, model_alias, model_resolved, provider,
    coalesce(sum(requests), 0)::bigint, coalesce(sum(success), 0)::bigint,
    coalesce(sum(error + timeout + interrupted), 0)::bigint,
    coalesce(sum(rate_limited), 0)::bigint, coalesce(sum(refused + blocked), 0)::bigint,
    coalesce(sum(client_closed), 0)::bigint,
    coalesce(sum(cache_hits), 0)::bigint, coalesce(sum(fallbacks), 0)::bigint, coalesce(sum(unpriced), 0)::bigint,
    coalesce(sum(input_tokens), 0)::bigint, coalesce(sum(output_tokens), 0)::bigint,
    coalesce(sum(total_tokens), 0)::bigint, coalesce(sum(cost_usd), 0), coalesce(sum(saved_usd), 0)
FROM rollup
WHERE day >= %(first)s AND day <= %(last)s
  AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s::text)
  AND (%(environment)s::text IS NULL OR environment = %(environment)s::text)
GROUP BY GROUPING SETS ((), (day), (feature_id), (model_alias, model_resolved, provider), (tenant_id));

-- name: ledger_sums
-- The same of the ledger's rows, for days that the rollups do not hold.
SELECT
    grouping(tenant_id, day, feature_id, provider)::int,
    day, tenant_id, feature_id, model_alias, model_resolved, provider,
    -- Adjustments are no calls: they have costs and nothing else.
    count(*) FILTER (WHERE adjusts IS NULL),
    count(*) FILTER (WHERE status = 'success' AND adjusts IS NULL),
    count(*) FILTER (WHERE status IN ('error', 'timeout', 'interrupted') AND adjusts IS NULL),
    count(*) FILTER (WHERE status = 'rate_limited' AND adjusts IS NULL),
    count(*) FILTER (WHERE status IN ('refused', 'blocked') AND adjusts IS NULL),
    count(*) FILTER (WHERE status = 'client_closed' AND adjusts IS NULL),
    count(*) FILTER (WHERE cache_hit AND adjusts IS NULL),
    count(*) FILTER (WHERE fallback_used AND adjusts IS NULL),
    count(*) FILTER (WHERE cost_status = 'unpriced') - count(*) FILTER (WHERE cost_status = 'repriced'),
    coalesce(sum(input_tokens), 0)::bigint, coalesce(sum(output_tokens), 0)::bigint,
    coalesce(sum(total_tokens), 0)::bigint, coalesce(sum(cost_usd), 0), coalesce(sum(saved_usd), 0)
FROM (
    SELECT (occurred_at AT TIME ZONE 'UTC')::date AS day, ledger.*
    FROM ledger
    WHERE occurred_at >= %(first)s::date::timestamp AT TIME ZONE 'UTC'
      AND occurred_at < (%(last)s::date::timestamp + interval '1 day') AT TIME ZONE 'UTC'
      AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s::text)
      AND (%(environment)s::text IS NULL OR environment = %(environment)s::text)
) AS calls
GROUP BY GROUPING SETS ((), (day), (feature_id), (model_alias, model_resolved, provider), (tenant_id));

-- name: rollup_costs
-- Dollars by day, of the rollups: for a trend, which needs no other sum.
SELECT day, sum(cost_usd)
FROM rollup
WHERE day >= %(first)s AND day <= %(last)s
  AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s::text)
GROUP BY day;

-- name: ledger_costs
-- The same of the ledger's rows, for days that the rollups do not hold.
SELECT (occurred_at AT TIME ZONE 'UTC')::date AS day, sum(cost_usd)
FROM ledger
WHERE occurred_at >= %(first)s::date::timestamp AT TIME ZONE 'UTC'
  AND occurred_at < (%(last)s::date::timestamp + interval '1 day') AT TIME ZONE 'UTC'
  AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s::text)
GROUP BY day;

-- name: spent_since
-- A tenant's tokens and dollars since a moment, from its rows.
SELECT coalesce(sum(total_tokens), 0)::bigint, coalesce(sum(cost_usd), 0)
FROM ledger
WHERE tenant_id = %(tenant)s AND occurred_at >= %(since)s::timestamptz;

-- name: spending
-- What tenants spent today, and on average on the days before it from the first with spend on; jumps first.
SELECT tenant_id, today, average
FROM (
    SELECT
        tenant_id,
        coalesce(sum(cost_usd) FILTER (WHERE day = %(today)s), 0) AS today,
        sum(cost_usd) FILTER (WHERE day < %(today)s)
            / nullif(%(today)s::date - min(day) FILTER (WHERE day < %(today)s AND cost_usd > 0), 0) AS average
    FROM rollup
    WHERE day >= %(since)s AND day <= %(today)s AND tenant_id IS NOT NULL
    GROUP BY tenant_id
) AS spent
WHERE today > 0 OR average > 0
ORDER BY coalesce(today > 1.2 * average AND average > 0, false) DESC, today DESC, tenant_id
LIMIT %(tenants)s;
