#!/usr/bin/env bash
# Install the programs that tests/slurm needs on Debian or Ubuntu: SLURM, MUNGE and shellcheck. Do nothing if all are installed.
# The tests start their own daemons, so the distribution's daemons are started neither now nor at the next boot.
set -euo pipefail

packages=()
have() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null; }
for program in slurmctld slurmd srun; do
  have "$program" || { packages+=(slurm-wlm) && break; }
done
have munged || packages+=(munge)
have shellcheck || packages+=(shellcheck)
if [ ${#packages[@]} -eq 0 ]; then exit 0; fi

if ! have apt-get; then
  echo "install.sh: ${packages[*]} missing, and there is no apt-get; install them by hand (SLURM 22.05 or later)" >&2
  exit 2
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! have sudo || ! sudo --non-interactive true 2>/dev/null; then
    echo "install.sh: ${packages[*]} missing, and installing needs root; run: sudo $0" >&2
    exit 2
  fi
  as_root=(sudo)
fi

# Mask the services before their packages are installed, so that they are never started. RUNLEVEL=1 has the same effect on
# invoke-rc.d on systems without systemd.
mask() {
  local service
  for service in slurmctld slurmd munge; do
    [ -e "/etc/systemd/system/$service.service" ] || [ -e "/lib/systemd/system/$service.service" ] ||
      "${as_root[@]}" ln -s /dev/null "/etc/systemd/system/$service.service"
  done
}
echo "install.sh: installing ${packages[*]}"
if [ -d /etc/systemd/system ]; then mask; fi
apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get --quiet=2)
"${apt[@]}" update
"${apt[@]}" install --yes --no-install-recommends "${packages[@]}" </dev/null
