-- name: usage
-- A tenant's calls of one UTC day, by alias, vendor model, status and whether the price was known.
SELECT
    model_alias,
    model_resolved,
    status,
    cost_status,
    count(*) FILTER (WHERE adjusts IS NULL),
    sum(input_tokens)::bigint,
    sum(output_tokens)::bigint,
    sum(total_tokens)::bigint,
    sum(cost_usd),
    sum(saved_usd),
    -- A call at the ceiling until its adjustment gave it its price.
    count(*) FILTER (WHERE cost_status = 'unpriced') - count(*) FILTER (WHERE cost_status = 'repriced')
FROM ledger
WHERE tenant_id = %(tenant)s
  AND occurred_at >= %(day)s::date::timestamp AT TIME ZONE 'UTC'
  AND occurred_at < (%(day)s::date::timestamp + interval '1 day') AT TIME ZONE 'UTC'
  AND (%(environment)s::text IS NULL OR environment = %(environment)s::text)
GROUP BY model_alias, model_resolved, status, cost_status
ORDER BY model_alias NULLS LAST, model_resolved NULLS LAST, status, cost_status;
