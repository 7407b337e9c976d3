-- name: ledger_page
-- Rows of a time span in their order, one page after the row that `after_at` and `after_id` name.
SELECT
    occurred_at, event_id, request_id, trace_id, tenant_id, feature_id, key_id, purpose, environment,
    model_alias, model_resolved, provider, vendor_request_id, status, error_code, cache_hit, fallback_used,
    input_tokens, output_tokens, total_tokens, cost_input_usd, cost_output_usd, cost_usd, saved_usd,
    cost_status, usage_source, price_table_version, config_version, event ->> 'prompt_version', adjusts::text, event::text
FROM ledger
WHERE occurred_at >= greatest(%(first)s::date::timestamp AT TIME ZONE 'UTC', %(after_at)s::timestamptz)
  AND occurred_at < (%(last)s::date::timestamp + interval '1 day') AT TIME ZONE 'UTC'
  AND (occurred_at, event_id) > (%(after_at)s::timestamptz, %(after_id)s::uuid)
  AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s::text)
  AND (%(environment)s::text IS NULL OR environment = %(environment)s::text)
  -- Who asks for calls of one purpose asks for calls: adjustments are none.
  AND (%(purpose)s::text IS NULL OR (purpose = %(purpose)s::text AND adjusts IS NULL))
  AND (%(cache_hits)s::boolean OR NOT cache_hit)
ORDER BY occurred_at, event_id
LIMIT %(rows)s;

-- name: rollup_page
-- Rollups of a time span, one page from a place on.
SELECT
    day, tenant_id, feature_id, model_alias, model_resolved, provider, environment,
    requests, success, error, refused, rate_limited, blocked, client_closed, interrupted, timeout,
    cache_hits, fallbacks, unpriced, input_tokens, output_tokens, total_tokens,
    cost_input_usd, cost_output_usd, cost_usd, saved_usd
FROM rollup
WHERE day >= %(first)s AND day <= %(last)s
  AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s::text)
  AND (%(environment)s::text IS NULL OR environment = %(environment)s::text)
ORDER BY day, tenant_id, feature_id, model_alias, model_resolved, provider, environment
OFFSET %(offset)s LIMIT %(rows)s;

-- name: unrolled_days
-- Days of a time span whose rollup is missing although the ledger has rows of them.
SELECT days.day::date
FROM generate_series(%(first)s::date::timestamp, %(last)s::date::timestamp, interval '1 day') AS days (day)
WHERE NOT EXISTS (SELECT FROM rollup_day WHERE rollup_day.day = days.day::date)
  AND EXISTS (
      SELECT FROM ledger
      WHERE occurred_at >= days.day AT TIME ZONE 'UTC' AND occurred_at < (days.day + interval '1 day') AT TIME ZONE 'UTC'
  );

-- name: cache_hits
-- How many calls of clients in a time span the cache answered.
SELECT count(*)
FROM ledger
WHERE occurred_at >= %(first)s::date::timestamp AT TIME ZONE 'UTC'
  AND occurred_at < (%(last)s::date::timestamp + interval '1 day') AT TIME ZONE 'UTC'
  AND cache_hit AND purpose = 'client'
  AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s::text)
  AND (%(environment)s::text IS NULL OR environment = %(environment)s::text);
