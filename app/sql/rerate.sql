-- name: page
-- Calls of a time span that were charged, with what their adjustments so far come to; one page after the row that `after_at`
-- and `after_id` name. An adjustment has its call's time, so it is found by the primary key.
SELECT
    call.occurred_at,
    call.event_id::text,
    call.event::text,
    call.cost_input_usd + coalesce(adjusted.input_usd, 0),
    call.cost_output_usd + coalesce(adjusted.output_usd, 0),
    call.cost_status = 'unpriced' AND NOT coalesce(adjusted.repriced, false),
    coalesce(adjusted.times, 0)
FROM ledger AS call
LEFT JOIN LATERAL (
    SELECT
        count(*) AS times,
        sum(cost_input_usd) AS input_usd,
        sum(cost_output_usd) AS output_usd,
        bool_or(cost_status = 'repriced') AS repriced
    FROM ledger
    WHERE occurred_at = call.occurred_at AND adjusts = call.event_id
) AS adjusted ON true
WHERE call.occurred_at >= greatest(%(first)s::date::timestamp AT TIME ZONE 'UTC', %(after_at)s::timestamptz)
  AND call.occurred_at < (%(last)s::date::timestamp + interval '1 day') AT TIME ZONE 'UTC'
  AND (call.occurred_at, call.event_id) > (%(after_at)s::timestamptz, %(after_id)s::uuid)
  AND call.adjusts IS NULL AND call.cost_status <> 'none' AND NOT call.cache_hit
ORDER BY call.occurred_at, call.event_id
LIMIT %(rows)s;
