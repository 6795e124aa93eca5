#!/usr/bin/env bash
# Installs SLURM and munge from the distribution's packages, without starting their services, if they are missing.
# tests/slurm starts daemons of its own. Exit status 3: this machine may not run such a test; the message says why.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

may_not() { echo "install: tests/slurm will be skipped: $*" >&2; exit 3; }
fail() { echo "install: $*" >&2; exit 1; }
missing() { for tool in "$@"; do command -v "$tool" >/dev/null || echo "$tool"; done; }

[ "$(uname -s)" = Linux ] || may_not "the hosts of its cluster are Linux namespaces, and this is $(uname -s)."
[ "$(id -u)" = 0 ] || may_not "slurmd and network namespaces need root, and this is user $(id -un)."
tools=(slurmctld slurmd sbatch munged ip unshare nsenter)
exec 9>"${TMPDIR:-/tmp}/vppo-install-slurm.lock"
flock 9 # two test processes may come here at once
if [ -n "$(missing "${tools[@]}")" ]; then
    command -v apt-get >/dev/null || may_not "it needs $(missing "${tools[@]}" | xargs), and there is no apt-get to install them."
    echo "install: slurm-wlm and munge, for tests/slurm"
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then # without it the services would start
        trap 'rm -f $policy' EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
    fi
    log=$(mktemp)
    packages() { DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurm-wlm munge iproute2; }
    { packages || { apt-get update -q && packages; }; } >"$log" 2>&1 9>&- ||
        fail "slurm-wlm and munge could not be installed, see $log"
    rm -f "$log"
    [ -z "$(missing "${tools[@]}")" ] || fail "slurm-wlm and munge are installed, but $(missing "${tools[@]}" | xargs) not found."
fi
refusal=$(unshare --net --uts --ipc --mount --pid --mount-proc --fork ip link add probe type veth peer name other 2>&1) ||
    may_not "no namespaces or no virtual network here: $refusal"
