"""Run a program that cannot outlive the one who started it: `python -I -S exec_tied.py PARENT SIGNAL USER PROGRAM ...`.

PARENT is the starter's process id, SIGNAL what the kernel sends when the thread that started us ends, whatever ended
it. USER is a system user to become (we are root then), `-` for nobody else. The process id stays the same.
Linux only; elsewhere the program is started without the tie.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 1, 8, 47, 2
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP = 28, 4
CAPABILITY_VERSION = 0x20080522


def become(user: str, libc: ctypes.CDLL) -> None:
    """Become `user`, and keep the one capability to pass through folders that only root may enter.

    A checkout below /root is one. The other way, to open such folders to everybody, would outlast this program.
    """
    import pwd

    entry = pwd.getpwnam(user)
    with open("/proc/self/status") as status:
        permitted = next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm:"))
    # The lesser one where there is a choice: containers commonly grant only the other.
    capability = CAP_DAC_READ_SEARCH if permitted >> CAP_DAC_READ_SEARCH & 1 else CAP_DAC_OVERRIDE
    # initdb asks access(), which looks at the real user alone unless the kernel is told to leave capabilities be.
    libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    os.environ["HOME"] = "/"
    bit = 1 << capability
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)  # effective, permitted, inheritable; the high words
    if libc.capset(header, sets) == 0:
        libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0)


def main(parent: str, signal_number: str, user: str, program: list[str]) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if user != "-":
            become(user, libc)
        libc.prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)  # after the change of user, which would clear it
        if os.getppid() != int(parent):
            sys.exit("the program that started this one is gone")
    os.execv(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
