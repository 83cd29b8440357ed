<#
.SYNOPSIS
Installs Talkoot for this user on Windows. It never asks for administrator rights. Experimental.

.DESCRIPTION
    powershell -ExecutionPolicy Bypass -File install.ps1 [-From SOURCE] [-Join INVITE] [-Service] [-DryRun]

1. It looks for `uv`, which installs Python programs. If there is no uv, it downloads a pinned release into
   %LOCALAPPDATA%\Programs\talkoot, and checks its checksum.
2. `uv tool install` makes an environment for Talkoot. uv picks the build of torch for this machine, without CUDA if
   there is no GPU, and installs a Python if the system's is too old or too new. If download.pytorch.org does not
   answer, torch comes from your package index.
3. With -Join, it offers to start a node whenever you log in.

To remove all of it, run `talkoot uninstall`, which says what to do. If that doesn't work, run `uv tool uninstall
talkoot`, or, if this script downloaded uv, remove %LOCALAPPDATA%\Programs\talkoot and
%USERPROFILE%\.local\bin\talkoot.exe.

.PARAMETER From
What to install: a folder, a wheel, an archive, or the address of one. The default is the clone that contains this
script.

.PARAMETER Join
The invite, or '@FILE' (in quotes) with a file that holds it. The script then offers to host experts whenever you log
in.

.PARAMETER Service
Accepts that offer in advance.

.PARAMETER DryRun
Only prints the commands that would change something.
#>
[CmdletBinding()]
param(
    [string]$From = '',
    [string]$Join = '',
    [switch]$Service,
    [switch]$DryRun
)

Set-StrictMode -Version 3.0
$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'  # Windows PowerShell downloads ten times slower while it shows progress
[Net.ServicePointManager]::SecurityProtocol = [Net.SecurityProtocolType]::Tls12
# Windows PowerShell ignores the variable
if ($env:HTTPS_PROXY) { [Net.WebRequest]::DefaultWebProxy = [Net.WebProxy]::new($env:HTTPS_PROXY) }

$UvVersion = '0.12.5'
$UvSha256 = '4c4d49d8738847d9b71ba319e49a5688c93eac0fe6204b1df24e98528dddf39a'  # checksum of uv's release
$TorchBuilds = 'https://download.pytorch.org/whl/cpu/torch/'  # where uv finds the builds that suit a machine
$Python = '>=3.11,<3.14'  # not 3.14, which lacks miniupnpc: nodes could not ask routers to forward a port
$NeededMB = 2000  # torch takes 1 GB without CUDA, and 7 GB with it

function Exit-WithError([string]$Message) {
    [Console]::Error.WriteLine("error: $Message")
    exit 1
}

# Runs a program, or only prints it.
function Invoke-Program([string]$Program, [string[]]$Arguments, [string]$WhenItFails) {
    if ($DryRun) {
        Write-Output "would run: '$Program' '$($Arguments -join "' '")'"
        return
    }
    & $Program @Arguments
    if ($LASTEXITCODE -ne 0) { Exit-WithError $WhenItFails }
}

function Get-Source {
    if ($From) {
        # uv would take the name of a folder for that of a package, and download it
        if (Test-Path -LiteralPath $From) { return (Get-Item -LiteralPath $From).FullName }
        return $From
    }
    $clone = Split-Path (Split-Path $PSScriptRoot)
    $project = Join-Path $clone 'pyproject.toml'
    if (-not (Test-Path $project) -or -not (Select-String -Path $project -Pattern '^name = "talkoot"$' -Quiet)) {
        Exit-WithError 'this script is not in a clone of Talkoot: pass -From SOURCE'
    }
    return $clone
}

function Test-Machine {
    $machine = if ($env:PROCESSOR_ARCHITEW6432) { $env:PROCESSOR_ARCHITEW6432 } else { $env:PROCESSOR_ARCHITECTURE }
    if ($machine -ne 'AMD64') {
        Exit-WithError "torch does not support Windows on ${machine}: use Windows on x64"
    }
    if (-not $env:LOCALAPPDATA) { Exit-WithError 'LOCALAPPDATA is not set: run this as an ordinary user' }
    $drive = [IO.DriveInfo]::new([IO.Path]::GetPathRoot($env:LOCALAPPDATA))
    $freeMB = [math]::Floor($drive.AvailableFreeSpace / 1e6)
    if ($freeMB -lt $NeededMB) {
        Exit-WithError "only $freeMB MB are free on $($drive.Name): Talkoot with torch needs $NeededMB MB"
    }
}

function Find-Uv([string]$Own) {
    $uv = Join-Path $Own 'uv\uv.exe'
    if (-not (Test-Path $uv)) {
        $found = Get-Command -Name uv -CommandType Application -ErrorAction SilentlyContinue | Select-Object -First 1
        if ($found) {
            if (-not ((& $found.Source tool install --help) -match '--torch-backend')) {
                Exit-WithError "$($found.Source) is too old to choose the build of torch: update it ('uv self update'), or remove it and run this again"
            }
            return $found.Source
        }
        Install-Uv $uv
    }
    # What this uv downloads goes into Talkoot's folder too.
    $env:UV_TOOL_DIR = Join-Path $Own 'tools'
    $env:UV_PYTHON_INSTALL_DIR = Join-Path $Own 'python'
    $env:UV_CACHE_DIR = Join-Path $Own 'cache'
    return $uv
}

function Install-Uv([string]$Uv) {
    $url = "https://github.com/astral-sh/uv/releases/download/$UvVersion/uv-x86_64-pc-windows-msvc.zip"
    if ($DryRun) {
        [Console]::WriteLine("would download uv $UvVersion from $url to $Uv")
        return
    }
    $scratch = Join-Path ([IO.Path]::GetTempPath()) ([IO.Path]::GetRandomFileName())
    $archive = Join-Path $scratch 'uv.zip'
    try {
        New-Item -ItemType Directory -Path $scratch | Out-Null
        try {
            Invoke-WebRequest -Uri $url -OutFile $archive -UseBasicParsing
        } catch {
            Exit-WithError "can't download ${url}: $($_.Exception.Message) Behind a proxy, set HTTPS_PROXY; without GitHub, install uv in another way"
        }
        if ((Get-FileHash -Path $archive -Algorithm SHA256).Hash -ne $UvSha256) {
            Exit-WithError "the file from $url has another checksum than uv ${UvVersion}: nothing was installed. Run this again, or install uv in another way"
        }
        Expand-Archive -Path $archive -DestinationPath $scratch
        New-Item -ItemType Directory -Path (Split-Path $Uv) -Force | Out-Null
        # moved into place at the end, so that there is never half of a uv
        Copy-Item -Path (Join-Path $scratch 'uv.exe') -Destination "$Uv.new"
        Move-Item -Path "$Uv.new" -Destination $Uv -Force
    } catch {
        Exit-WithError "can't write ${Uv}: $($_.Exception.Message)"
    } finally {
        Remove-Item -Path $scratch -Recurse -Force -ErrorAction SilentlyContinue
    }
}

function Test-Url([string]$Url) {
    try {
        Invoke-WebRequest -Uri $Url -TimeoutSec 10 -UseBasicParsing | Out-Null
        return $true
    } catch {
        return $false
    }
}

if ($Service -and -not $Join) { Exit-WithError '-Service needs -Join INVITE' }
$source = Get-Source
Test-Machine
$uv = Find-Uv (Join-Path $env:LOCALAPPDATA 'Programs\talkoot')

$backend = @('--torch-backend', 'auto')
if (-not (Test-Url $TorchBuilds)) {
    Write-Output 'download.pytorch.org does not answer: torch comes from your package index, perhaps with CUDA (3 GB)'
    $backend = @()
}
# this also repairs or updates an existing installation
Invoke-Program -Program $uv -Arguments (
    @('tool', 'install') + $backend + @('--python', $Python, '--reinstall-package', 'talkoot', $source)
) -WhenItFails 'uv could not install Talkoot: see its message above. Behind a proxy, set HTTPS_PROXY. Stop a running node. Then run this again: it continues from here'
$talkoot = 'talkoot'
if (-not $DryRun) {
    $talkoot = Join-Path (& $uv tool dir --bin) 'talkoot.exe'
    Invoke-Program -Program $talkoot -Arguments '--version' -WhenItFails "$talkoot does not run: please report what it says"
    if (-not (Get-Command -Name talkoot -ErrorAction SilentlyContinue)) {
        Write-Output "$(Split-Path $talkoot) is not in your PATH: '$uv tool update-shell' adds it."
    }
    Write-Output "'$talkoot doctor' checks this machine, '$talkoot update' updates Talkoot, and '$talkoot uninstall' removes it."
}

$wanted = $Service -or $DryRun
if ($Join -and -not $wanted) {
    $wanted = (Read-Host 'Host experts whenever you log in, starting now? [y/N]') -match '^[yY]'
}
if ($Join -and $wanted) {
    Invoke-Program -Program $talkoot -Arguments @('service', 'install', '--join', $Join) `
        -WhenItFails "Talkoot is installed, but its service is not: run 'talkoot service install' again, or 'talkoot node' by hand"
} else {
    Write-Output 'To host experts whenever you log in: talkoot service install --join INVITE'
}
