"""What TF Serving's own tests ask and expect, as data.

Read from tensorflow/serving (Apache-2.0) at COMMIT; each case is named FILE::TEST, with a number where a test asks
several times. Inputs and expected values alone are theirs. What tfvllm answers otherwise stands in `differences`.
"""

COMMIT = "9d981c5c2708d23c5407c7c1e30309e6f9798874"
