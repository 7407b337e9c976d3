"""The vendor simulator: a real HTTP server that speaks as LLM vendors do, and fails as it is told.

    python -m loadtest.simulator --port 4010

Vendors live under `/{vendor}/...` with their own paths after it (`/openai/v1/chat/completions`; `azure` has Azure's); a
vendor without a shape of its own speaks OpenAI's. Any key is good but those that begin with `bad-`; signatures for
Bedrock are checked (`bedrock_access`). What is said depends on the request alone (`content`, which also lists the
directives that a prompt may hold, such as `tokens=500 chunk_ms=20`).

Admin calls, on the same port:

    PUT    /_sim/faults/{vendor}   {"kind": "throttle", "retry_after": 2, "times": 3}, or a list (`faults` has all)
    DELETE /_sim/faults/{vendor}   or /_sim/faults for every vendor
    GET    /_sim/faults            those in force
    GET    /_sim/counts            per vendor: requests, streams, completed, aborted by the client, broken by a
                                   fault, open now, by path and status
    GET    /_sim/requests?vendor=  the last 200 of each vendor: method, path, headers, body, received_ms,
                                   hung_up_ms, status
    DELETE /_sim/requests          forget counts and requests
    GET    /_sim/health
"""
