"""Run outside the checkout, where only this wheel is installed."""

import fourfold_common as common

device, reason = common.pick_device()
results = common.Results("fourfold-common")
results.add(device.type, "empty call", common.time_call(lambda: None).median_ms, "ms")
print(results.to_markdown())
