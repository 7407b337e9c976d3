#!/usr/bin/env bash
# Does the gateway answer? Run after each deploy. LLM_GATEWAY_URL, HELLO_SHIP_GATEWAY_KEY; CURL_CA_BUNDLE for a local CA.
set -euo pipefail
GW="${LLM_GATEWAY_URL:-https://localhost:4000}"
KEY="${HELLO_SHIP_GATEWAY_KEY:?the gateway key to call with}"
curl -sf "$GW/health" | grep -q ok
curl -sf "$GW/v1/chat/completions" \
  -H "Authorization: Bearer $KEY" \
  -H "X-Tenant-Id: smoke-test" \
  -H "Content-Type: application/json" \
  -d '{"model":"support-fast","messages":[{"role":"user","content":"ping"}]}' \
  | jq -e '.choices[0].message.content' >/dev/null
echo "gateway_smoke ok"
