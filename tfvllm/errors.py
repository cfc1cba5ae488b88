"""What tfvllm raises. The command line turns each class into its exit code and one clear line."""


class TfvllmError(Exception):
    """The work failed (exit code 1).

    Example:
        >>> tfvllm.errors.TfvllmError.exit_code
        1
    """

    exit_code = 1


class InputError(TfvllmError, ValueError):
    """The call or its input is wrong (exit code 2).

    The message says what was expected, what was found and what to do next.

    Example:
        >>> try:
        ...     tfvllm.simplify(tiny_bert(), target="gpu")
        ... except tfvllm.errors.InputError as error:
        ...     print(error)
        target: expected one of portable, onednn, found 'gpu'.
    """

    exit_code = 2


class VerificationError(TfvllmError):
    """A rewritten model does not compute what the original computes (exit code 3). Nothing was written.

    Example:
        >>> tfvllm.errors.VerificationError.exit_code
        3
    """

    exit_code = 3
