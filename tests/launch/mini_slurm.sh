#!/usr/bin/env bash
# A real Slurm cluster of fake nodes on one host: no systemd, no cgroups, no accounting, loopback only.
#   mini_slurm.sh install | start | stop | status | env | kill-node N | kill-daemon N | start-node N
# MINI_SLURM_DIR (default: a folder below TMPDIR)  MINI_SLURM_NODES (2)  MINI_SLURM_GPUS (8)  MINI_SLURM_CPUS (16)
# MINI_SLURM_NETNS=1: each node in a network namespace of its own; run it, and its clients, inside `unshare -n`.
#
# Each node is a PID + UTS + mount namespace: own host name (node1 …), own /proc, and a private /etc/hosts with
# the nodes' names. The host's files are not touched. Needs root, for unshare. The fake GPUs are links to /dev/null.
set -euo pipefail
DIR=${MINI_SLURM_DIR:-${TMPDIR:-/tmp}/qatapult-mini-slurm} NODES=${MINI_SLURM_NODES:-2}
GPUS=${MINI_SLURM_GPUS:-8} CPUS=${MINI_SLURM_CPUS:-16} NETNS=${MINI_SLURM_NETNS:-0}
export SLURM_CONF=$DIR/etc/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin
if [ "$NETNS" = 1 ]; then NET=10.213.57 CONTROLLER=10.213.57.1; else NET=127.0.0 CONTROLLER=127.0.0.1; fi
say() { printf 'mini-slurm: %s\n' "$*" >&2; }

install() {
  local program missing=
  for program in slurmctld slurmd sbatch munged ip pgrep; do command -v "$program" >/dev/null || missing=$program; done
  [ -z "$missing" ] && return 0
  apt-get update -qq >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge iproute2 procps </dev/null >/dev/null
}

configure() {
  [ -e "$DIR" ] && [ ! -e "$DIR/etc/slurm.conf" ] && { say "$DIR exists and is not a mini-slurm folder"; exit 1; }
  rm -rf "$DIR"
  mkdir -p "$DIR"/{etc,state,log,run,spool,munge,dev}
  chmod 755 "$DIR"; chmod 711 "$DIR/munge"
  ( umask 077; dd if=/dev/urandom of="$DIR/munge/key" bs=128 count=1 status=none )
  local i; for ((i=0; i<GPUS; i++)); do ln -s /dev/null "$DIR/dev/nvidia$i"; done
  local ports; read -ra ports < <(python3 -c '
import socket, sys
s = [socket.socket() for _ in range(int(sys.argv[1]) + 1)]
for x in s: x.bind(("0.0.0.0", 0))
print(*[x.getsockname()[1] for x in s])' "$NODES")
  { echo "127.0.0.1 localhost"; echo "$CONTROLLER ctld $(hostname)"
    for ((i=1; i<=NODES; i++)); do echo "$NET.$((10+i)) node$i"; mkdir -p "$DIR/spool/node$i"; done; } > "$DIR/etc/hosts"
  cat > "$DIR/etc/slurm.conf" <<CONF
ClusterName=mini
SlurmctldHost=$(hostname)($CONTROLLER)
SlurmctldPort=${ports[0]}
$([ "$NETNS" = 1 ] || echo CommunicationParameters=NoCtldInAddrAny)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/munge/sock,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=${MINI_SLURM_KILLWAIT:-10}
BatchStartTimeout=10
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
SlurmdParameters=config_overrides
$(for ((i=1; i<=NODES; i++)); do
    port=${ports[i]}; [ "$NETNS" = 1 ] && port=${ports[1]}
    echo "NodeName=node$i NodeHostname=node$i NodeAddr=$NET.$((10+i)) Port=$port CPUs=$CPUS RealMemory=64000$([ "$GPUS" -gt 0 ] && echo " Gres=gpu:$GPUS") State=UNKNOWN"
  done)
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=10
PartitionName=scavenge Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1 GraceTime=20
CONF
  echo "AutoDetect=off" > "$DIR/etc/gres.conf"
  if [ "$GPUS" -gt 0 ]; then
    echo "NodeName=node[1-$NODES] Name=gpu File=$DIR/dev/nvidia[0-$((GPUS-1))]" >> "$DIR/etc/gres.conf"
  fi
}

start_node() { # N
  local n=$1 namespaces=(--mount --uts --pid) launcher inner
  [ "$NETNS" = 1 ] && namespaces+=(--net)
  DIR=$DIR n=$n NETNS=$NETNS setsid unshare "${namespaces[@]}" --fork --kill-child --mount-proc --propagation private bash -c '
    if [ "$NETNS" = 1 ]; then
      ip link set lo up
      for ((k=0; k<100; k++)); do ip -4 addr show eth0 2>/dev/null | grep -q inet && break; sleep 0.05; done
    fi
    mount --bind "$DIR/etc/hosts" /etc/hosts
    hostname "node$n"
    unset DIR NETNS
    slurmd -D -f "$SLURM_CONF" -N "node$n" & wait $!
    sleep infinity' >"$DIR/log/slurmd-node$n.out" 2>&1 </dev/null &
  launcher=$!; echo "$launcher" > "$DIR/run/node$n.hostpid"
  [ "$NETNS" = 1 ] || return 0
  for ((k=0; k<100; k++)); do
    inner=$(pgrep -P "$launcher" || true)
    [ -n "$inner" ] && [ "$(readlink "/proc/$inner/ns/net")" != "$(readlink /proc/self/ns/net)" ] && break
    sleep 0.02
  done
  ip link add "v$n" type veth peer name eth0 netns "$inner"; ip link set "v$n" master ms0 up
  nsenter -t "$inner" -n sh -c "ip addr add $NET.$((10+n))/24 dev eth0; ip link set eth0 up"
}

wait_gone() { # PID seconds
  local i
  for ((i=0; i<$2*20; i++)); do
    [ -d "/proc/$1" ] && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null || return 0
    sleep 0.05
  done
  return 1
}
kill_pidfile() { # FILE SIGNAL NAME: only kills a process that still is the program named
  local p; [ -s "$1" ] || return 0; p=$(cat "$1")
  if [ -r "/proc/$p/comm" ] && [ "$(cat "/proc/$p/comm" 2>/dev/null)" = "$3" ]; then
    kill "-$2" "$p" 2>/dev/null || true; wait_gone "$p" 5 || kill -9 "$p" 2>/dev/null || true; wait_gone "$p" 5 || true
  fi; rm -f "$1"
}
kill_node() { # N: the whole node dies at once, as in a power cut
  kill_pidfile "$DIR/run/node$1.hostpid" KILL unshare   # --kill-child: its PID namespace goes with it
}
kill_daemon() { # N: slurmd alone dies; the node's job steps live on as orphans
  local shell daemon
  shell=$(pgrep -P "$(cat "$DIR/run/node$1.hostpid")")
  daemon=$(pgrep -P "$shell" -x slurmd); kill -9 "$daemon"; wait_gone "$daemon" 5
}

start() {
  [ -e "$DIR/run" ] && stop
  install
  configure
  if [ "$NETNS" = 1 ]; then
    ip link set lo up
    ip link show ms0 >/dev/null 2>&1 || { ip link add ms0 type bridge; ip addr add "$CONTROLLER/24" dev ms0; ip link set ms0 up; }
  fi
  munged --key-file="$DIR/munge/key" --socket="$DIR/munge/sock" --pid-file="$DIR/munge/pid" \
    --log-file="$DIR/munge/log" --seed-file="$DIR/munge/seed" </dev/null
  setsid slurmctld -D -i -f "$SLURM_CONF" >"$DIR/log/slurmctld.out" 2>&1 </dev/null &
  local controller=$! i
  for ((i=1; i<=NODES; i++)); do start_node "$i"; done
  for ((i=0; i<300; i++)); do
    [ "$(timeout 5 sinfo -h -N -p debug -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$NODES" ] && { say "$NODES nodes idle"; return 0; }
    kill -0 "$controller" 2>/dev/null || break
    sleep 0.1
  done
  say "nodes did not become idle"; timeout 5 sinfo -N -l >&2 || true; tail -n 20 "$DIR"/log/* >&2; return 1
}

stop() {
  [ -e "$DIR/run" ] || return 0
  local f
  for f in "$DIR"/run/node*.hostpid; do [ -e "$f" ] && kill_pidfile "$f" KILL unshare; done
  kill_pidfile "$DIR/run/slurmctld.pid" TERM slurmctld
  kill_pidfile "$DIR/munge/pid" TERM munged
  rm -rf "$DIR/run"
}

case ${1:-} in
  install) install ;;
  start) start ;;
  stop) stop ;;
  status) sinfo -N -l; squeue ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  kill-node) kill_node "$2" ;;
  kill-daemon) kill_daemon "$2" ;;
  start-node) start_node "$2" ;;
  *) echo "usage: $0 install|start|stop|status|env|kill-node N|kill-daemon N|start-node N" >&2; exit 2 ;;
esac
