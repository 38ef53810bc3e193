-- What wrk measured, as one line of JSON at the end of its output.
function done(summary, latency, requests)
  local e = summary.errors
  print(string.format(
    '{"requests": %d, "microseconds": %d, "failed": %d, "p50": %d, "p99": %d, "max": %d}',
    summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(99), latency.max))
end
